"""The student of a finished run: its file, and how eval and export find it again."""

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

STUDENT = "student."


def load_run(path: str, use_ema: bool) -> tuple[nn.Module, TrainConfig, str]:
    """The student of a run, its settings, and which weights they are.

    Args:
        path: Out folder of ``train``, or one checkpoint in it.
        use_ema: Take the averaged weights where there are some.

    Raises:
        InputError: If there is no run with a good checkpoint.
    """
    folder = Path(path)
    run = folder / "run" if (folder / "run").is_dir() else folder.parent.parent
    file = run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{folder} is no run of train; give its --out folder")
    settings = parse(TrainConfig, ["--config", str(file)], prog="scalekd train")
    one = (folder / "manifest.json").is_file()
    found = checkpoint.load(folder) if one else checkpoint.latest(run / "checkpoints")
    if found is None:
        raise InputError(f"{folder} holds no good checkpoint; train it first")
    ema: Any = found.state["extra"]["ema"]
    averaged = use_ema and ema is not None
    weights: Any = ema if averaged else found.tensors
    student = build_student(_bare(settings))
    student.load_state_dict(student_weights(weights))
    return student.eval(), settings, "averaged weights" if averaged else "last weights"


def student_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of what was trained, under the student's own names.

    Raises:
        InputError: If there is none.
    """
    plain = {key.replace("_orig_mod.", "").removeprefix("module."): v for key, v in tensors.items()}
    own = {key.removeprefix(STUDENT): v for key, v in plain.items() if key.startswith(STUDENT)}
    if not own:
        raise InputError("the checkpoint holds no student; give a run of scalekd train")
    return own


def _bare(settings: TrainConfig) -> Any:
    """The student as built, without the weights that it started from."""
    import dataclasses

    return dataclasses.replace(settings, pretrained=False, student_checkpoint=None)


def write_student(student: nn.Module, path: Path) -> None:
    """The student's own weights under the student's own names."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors))
