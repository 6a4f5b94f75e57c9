"""The student of a run: the file that timm loads, and how ``eval`` and ``export`` find it again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.parsing import parse
from scalekd.adapters.models import build_student
from scalekd.config import TrainConfig

STUDENT_PREFIX = "student."  # of the student's weights among all that was trained


@dataclass(frozen=True)
class TrainedStudent:
    """A student with the weights of a run.

    Attributes:
        model: In evaluation mode, on the CPU.
        settings: Of the run.
        weights: "averaged weights" or "last weights".
    """

    model: nn.Module
    settings: TrainConfig
    weights: str


def write_student(student: nn.Module, path: Path) -> None:
    """Write the student's own weights under the student's own names (safetensors)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors))


def load_student(path: str, use_ema: bool) -> TrainedStudent:
    """Load the student of a run.

    Args:
        path: Out folder of ``train``, or one checkpoint in it.
        use_ema: Take the averaged weights where there are some.

    Raises:
        InputError: If there is no run with a good checkpoint.
    """
    # The settings lie beside the checkpoints, whichever of the two folders was given.
    folder = Path(path)
    run = folder / "run" if (folder / "run").is_dir() else folder.parent.parent
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise InputError(f"{folder} is no run of train; give its --out folder")
    settings = parse(TrainConfig, ["--config", str(config_file)], prog="scalekd train")

    is_checkpoint = (folder / "manifest.json").is_file()
    saved = checkpoint.load(folder) if is_checkpoint else checkpoint.latest(run / "checkpoints")
    if saved is None:
        raise InputError(f"{folder} holds no good checkpoint; train it first")

    # The network as timm builds it, without the weights that the run started from.
    average: Any = saved.state["extra"]["ema"]
    averaged = use_ema and average is not None
    untrained = dataclasses.replace(settings, pretrained=False, student_checkpoint=None)
    student = build_student(untrained)
    trained: Any = average if averaged else saved.tensors
    student.load_state_dict(select_student(trained))
    return TrainedStudent(
        student.eval(), settings, "averaged weights" if averaged else "last weights"
    )


def select_student(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's part of what was trained, under the student's own names.

    Raises:
        InputError: If there is none.
    """
    plain = {key.replace("_orig_mod.", "").removeprefix("module."): v for key, v in tensors.items()}
    student = {
        key.removeprefix(STUDENT_PREFIX): value
        for key, value in plain.items()
        if key.startswith(STUDENT_PREFIX)
    }
    if not student:
        raise InputError("the checkpoint holds no student; give a run of scalekd train")
    return student
