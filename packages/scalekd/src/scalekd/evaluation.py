"""The ``eval`` command, and the accuracy that ``train`` ends with."""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.logging import progress
from effml_common.parsing import parse
from effml_common.report import Report, Row, environment
from scalekd.adapters.data import CheckedImages, dataset_of, evaluation_loader, on_device
from scalekd.adapters.models import build_student
from scalekd.config import DataConfig, EvalConfig, TrainConfig

STUDENT = "student."


@torch.no_grad()
def accuracy_of(
    student: nn.Module,
    config: DataConfig,
    size: int,
    split: str,
    device: torch.device,
    batch: int = 256,
) -> dict[str, float]:
    """Top-1, top-5 (percent) and cross entropy of a student on one split.

    Raises:
        InputError: If the images cannot be read.
    """
    images: Any = dataset_of(config, split, training=False, batch=batch)
    if not isinstance(images, torch.utils.data.IterableDataset):
        classes = getattr(student, "num_classes", 10**9)
        images = CheckedImages(images, classes, config.skip_bad)
    loader = evaluation_loader(images, size, student, batch, config.workers, device)
    evaluator = ClassificationEvaluator(device=device)
    student = student.to(device).eval()
    with progress("evaluating", len(loader)) as bar:
        for batch_of in loader:
            x, y, _ = on_device(batch_of, device, channels_last=False)
            evaluator.update(student(x), y)
            bar.advance()
    found = evaluator.summary()
    return {name: float(found[name]) for name in ("top1", "top5", "loss")}


def evaluate(config: EvalConfig) -> Report:
    """Accuracy of a trained student.

    Raises:
        InputError: If the device is not there, or the run or the images cannot be read.
    """
    started = time.monotonic()
    device = resolve_device(config.device)
    student, settings, which = load_run(config.checkpoint, config.use_ema)
    score = accuracy_of(
        student, config, settings.img_size, config.val_split, device, config.batch_size
    )
    return Report(
        package="scalekd",
        version=version("scalekd"),
        command=sys.argv,
        seeds=[settings.seed],
        seconds=time.monotonic() - started,
        rows=[Row(settings.student, which, {name: [value] for name, value in score.items()})],
        environment=environment(("timm",), str(device)),
    )


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
