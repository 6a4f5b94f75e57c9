"""The command line as a whole: refusals in one line, devices, ``python -m``."""

import subprocess
import sys

import pytest
import torch
from morse_commands import run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--budget-lsd", "0.5", "--n", "6"], "at least 1 LSD"),
        (["plan", "--budget-lsd", "10", "--n", "1"], "N is 1.0"),
        (["plan", "--budget-lsd", "10", "--n", "6", "--early", "0.5"], "early is 0.5"),
        (["plan", "--budget-lsd", "10"], "N is not given"),
        (["plan", "--budget-ms", "10"], "no profile is given"),
        (["inspect"], "either a Dot or the published shape"),
        (["inspect", "--dot", "nowhere"], "holds no Dot"),
        (["train-dot", "nowhere", "nowhere"], "holds no diffusers pipeline"),
        (["train-dot", "a", "b", "--m", "2", "--channels", "8"], "do not fit m=2"),
        (["train-dot", "a", "b", "--gap-max", "0"], "gap_max is 0"),
        (["train-dot", "a", "b", "--guidance", "9", "2"], "guidance is [9.0, 2.0]; give one scale"),
        (["train-dot", "a", "b", "--batch", "0"], "batch is 0; give 1 or more"),
        (["sample", "nowhere", "dot"], "holds no diffusers pipeline"),
        (["sample", "a", "b", "--budget-lsd", "0"], "budget_lsd is 0"),
        (["bench", "a", "b", "c", "--baselines", "magic"], "baseline ['magic'] is not known"),
        (["demo", "--samples", "4"], "samples is 4; give 32 or more"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    words, said, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = run(capsys, *words, code=2).removeprefix("device: cpu\n")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(pixels, trained, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    error = run(capsys, "sample", pixels, trained, "--device", "cuda", code=2)
    assert error.startswith("error: device cuda is not there")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "train-dot", "sample", "bench"])
def test_every_command_that_computes_takes_a_device(command, pixels, photos, capsys) -> None:
    places = {"demo": (), "train-dot": (pixels, photos), "sample": (pixels, "dot")}
    words = [command, *places.get(command, (pixels, "dot", photos)), "--device", "gpu"]
    assert run(capsys, *words, code=2) == (
        "error: device 'gpu' is unknown; use auto (cuda, else cpu), cpu, cuda, cuda:N, mps or xpu\n"
    )


def test_the_package_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "morse_diffusion", "demo", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "morse-diffusion demo --seeds 3" in done.stdout
