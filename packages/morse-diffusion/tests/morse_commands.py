"""The command line in this process, to save the imports."""

from effml_common.cli import main
from morse_diffusion.cli import COMMANDS

TRAIN = ["--m", "1", "--channels", "8", "--rank", "2", "--steps", "6", "--batch", "4"]
TRAIN += ["--lr", "1e-3", "--save-every", "3"]


def run_command(*words: object) -> int:
    return main("morse-diffusion", "morse-diffusion", COMMANDS, [str(word) for word in words])


def run(capsys, *words: object, code: int = 0) -> str:
    """Standard output of a command that succeeds, standard error of one that fails."""
    capsys.readouterr()
    # What is tested here is the same on a machine with a card.
    place = ("--device", "cpu") if words[0] in ("demo", "train-dot", "sample", "bench") else ()
    assert run_command(*(words if "--device" in words else (*words, *place))) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err
