"""What a run will do, settled before anything is read or built."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effml_common.folders import check_out_folder, run_folder
from scalekd.config import TrainConfig
from scalekd.training.recipe import Recipe, resolve_recipe

STUDENT_FILE = "student.safetensors"  # in the out folder
# Settings that may differ between a run and its continuation.
FREE_SETTINGS = {
    *("out", "resume", "log_every", "save_every", "workers", "device", "data_dir", "compile"),
    *("teacher_checkpoint", "student_checkpoint"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The settings of a run with nothing left open.

    Attributes:
        config: Settings of the command.
        recipe: Optimisation.
        out: Folder of the result.
    """

    config: TrainConfig
    recipe: Recipe
    out: Path

    @property
    def run_folder(self) -> Path:
        """Folder of the record of the run."""
        return self.out / "run"

    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that a continued run must share, in JSON types."""
        values = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in FREE_SETTINGS
        }


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Settle recipe and out folder.

    Raises:
        InputError: If the folder holds an earlier run that is not to be resumed.
    """
    out = run_folder(config.out, "train")
    check_out_folder(out, [STUDENT_FILE, "run/checkpoints"], resume=config.resume == "auto")
    return TrainingPlan(config=config, recipe=resolve_recipe(config), out=out)
