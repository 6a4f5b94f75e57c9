"""Whether ``train`` may write into a folder, and whether it continues the run that is there."""

from dataclasses import asdict
from pathlib import Path

from af_dcd.config import TrainConfig
from effml_common.folders import check_out_folder, check_same_settings
from effml_common.logging import jsonable
from effml_common.parsing import parse

RESULTS = ("run/checkpoints", "student.pth")  # in the folder of a run
CHANGEABLE = ("resume", "save_every", "out", "launcher", "device")  # without another result


def check_folder(out: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds another run, and one whose run had other settings.

    Raises:
        InputError: If the folder holds a run and ``resume`` is never.
        CheckpointError: If it holds a run of other settings.
    """
    resume, settings_file = config.resume == "auto", out / "run" / "config.yaml"
    check_out_folder(out, RESULTS, resume=resume)

    # Settings that an earlier version did not have yet are at their defaults.
    if resume and settings_file.is_file():
        earlier = parse(TrainConfig, ["--config", str(settings_file)], prog="af-dcd train")
        settings = jsonable(asdict(earlier))
        check_same_settings(settings, asdict(config), place=out, free=CHANGEABLE)
