"""The ``export`` command: the student alone, as timm loads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import nn

from effml_common.errors import InputError
from scalekd.adapters.models import json_object
from scalekd.config import ExportConfig, TrainConfig
from scalekd.training.runs import load_run, write_student


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: str
    weights: str
    parameters: int
    load_with: str
    largest_gap: float | None

    def to_json(self) -> dict[str, Any]:
        """The facts."""
        return dict(vars(self))

    def __rich__(self) -> Any:
        lines = [f"{self.file}: {self.parameters / 1e6:.2f}M weights ({self.weights})"]
        lines += [f"load with: {self.load_with}"]
        if self.largest_gap is not None:
            lines += [f"loaded by timm, largest gap of the logits: {self.largest_gap}"]
        return "\n".join(lines)


def export(config: ExportConfig) -> Exported:
    """Write the student of a run and, with ``verify``, load it with timm.

    Raises:
        InputError: If there is no such run, the file exists, or timm's logits differ.
    """
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another --out")
    student, settings, which = load_run(config.checkpoint, config.use_ema)
    write_student(student, out)
    gap = verify(student, settings, out) if config.verify else None
    return Exported(
        file=str(out),
        weights=which,
        parameters=sum(p.numel() for p in student.parameters()),
        load_with=load_line(settings, str(out)),
        largest_gap=gap,
    )


def arguments_of(settings: TrainConfig) -> dict[str, Any]:
    """What ``timm.create_model`` needs beside the name and the file."""
    arguments = {"num_classes": settings.num_classes, **json_object(settings.student_args)}
    model: Any = timm.create_model(settings.student, **arguments)
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    if getattr(embed, "img_size", None) not in (None, (settings.img_size,) * 2):
        arguments.setdefault("img_size", settings.img_size)
    return arguments


def load_line(settings: TrainConfig, file: str) -> str:
    """The line of Python that loads the student."""
    words = ", ".join(f"{name}={value!r}" for name, value in arguments_of(settings).items())
    return f'timm.create_model("{settings.student}", {words}, checkpoint_path="{file}")'


@torch.no_grad()
def verify(student: nn.Module, settings: TrainConfig, file: Path) -> float:
    """Largest gap of the logits between the student and what timm loads from the file.

    Raises:
        InputError: If it is not 0, or keys of the training are in the file.
    """
    with safe_open(file, "pt") as opened:
        foreign = [k for k in opened.keys() if k.startswith(("student.", "projectors.", "module."))]  # noqa: SIM118
    if foreign:
        raise InputError(
            f"{file} holds {foreign[0]}, which is no part of the student; export again"
        )
    loaded = timm.create_model(
        settings.student, checkpoint_path=str(file), **arguments_of(settings)
    ).eval()
    x = torch.randn(
        2, 3, settings.img_size, settings.img_size, generator=torch.Generator().manual_seed(0)
    )
    gap = float((loaded(x) - student.cpu().eval()(x)).abs().max())
    if gap != 0:
        raise InputError(f"the student loaded by timm differs by {gap:.3g}; do not use the file")
    return gap
