"""The ``export`` command: the student alone, as timm loads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open

from effml_common.errors import InputError
from scalekd.adapters.models import count_parameters, json_object
from scalekd.config import ExportConfig, TrainConfig
from scalekd.training.students import TrainedStudent, load_student, write_student

# Starts of names that only what was trained beside the student has.
TRAINING_PREFIXES = ("student.", "projectors.", "module.")


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    file: str
    weights: str
    parameters: int
    load_with: str
    largest_gap: float | None

    def to_json(self) -> dict[str, Any]:
        """The values in plain JSON types."""
        return dict(vars(self))

    def __rich__(self) -> Any:
        lines = [f"{self.file}: {self.parameters / 1e6:.2f}M weights ({self.weights})"]
        lines += [f"load with: {self.load_with}"]
        if self.largest_gap is not None:
            lines += [f"loaded by timm, largest gap of the logits: {self.largest_gap}"]
        return "\n".join(lines)


def export(config: ExportConfig) -> ExportSummary:
    """Write the student of a run and, with ``verify``, load it with timm.

    Raises:
        InputError: If there is no such run, the file exists, or timm's logits differ.
    """
    # Read the run.
    out = Path(config.out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another --out")
    student = load_student(config.checkpoint, config.use_ema)

    # Write the student, and see what timm makes of it.
    write_student(student.model, out)
    gap = verify_file(student, out) if config.verify else None
    return ExportSummary(
        file=str(out),
        weights=student.weights,
        parameters=count_parameters(student.model),
        load_with=loading_line(student.settings, str(out)),
        largest_gap=gap,
    )


@torch.no_grad()
def verify_file(student: TrainedStudent, file: Path) -> float:
    """Compare the logits of the student with those of what timm loads from its file.

    Returns:
        The largest gap: 0.

    Raises:
        InputError: If it is not 0, or names of the training are in the file.
    """
    # Nothing of the training may be in the file.
    with safe_open(file, "pt") as opened:
        foreign = [name for name in opened.keys() if name.startswith(TRAINING_PREFIXES)]  # noqa: SIM118
    if foreign:
        raise InputError(
            f"{file} holds {foreign[0]}, which is no part of the student; export again"
        )

    # The same random images through both.
    settings = student.settings
    loaded = timm.create_model(
        settings.student, checkpoint_path=str(file), **timm_arguments(settings)
    ).eval()
    side, generator = settings.img_size, torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, side, side, generator=generator)
    gap = float((loaded(x) - student.model.cpu().eval()(x)).abs().max())
    if gap != 0:
        raise InputError(f"the student loaded by timm differs by {gap:.3g}; do not use the file")
    return gap


def loading_line(settings: TrainConfig, file: str) -> str:
    """Return the line of Python that loads the student."""
    words = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(settings).items())
    return f'timm.create_model("{settings.student}", {words}, checkpoint_path="{file}")'


def timm_arguments(settings: TrainConfig) -> dict[str, Any]:
    """Return what ``timm.create_model`` needs beside the name and the file."""
    arguments = {"num_classes": settings.num_classes, **json_object(settings.student_args)}
    model: Any = timm.create_model(settings.student, **arguments)
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    if getattr(embed, "img_size", None) not in (None, (settings.img_size,) * 2):
        arguments.setdefault("img_size", settings.img_size)
    return arguments
