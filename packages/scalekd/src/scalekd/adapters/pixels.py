"""Which images a network expects: their size, and the normalisation of their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from effml_common.errors import ConfigError
from effml_common.logging import say

# Mean and standard deviation of ImageNet's pixels, for models that name no other.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT_SIZE = (224, 224)  # (h, w) of images for students that name none
Resize = Literal["auto", "none"]
PixelStatistics = tuple[Sequence[float], Sequence[float]]  # mean, standard deviation by channel


@dataclass(frozen=True, kw_only=True)
class PairImages:
    """The images of a pair.

    Attributes:
        student_size: (h, w) of the student's images.
        teacher_size: (h, w) of the teacher's images.
        student_pixels: Mean and standard deviation that the student expects.
        teacher_pixels: Mean and standard deviation that the teacher expects.
    """

    student_size: tuple[int, int]
    teacher_size: tuple[int, int]
    student_pixels: PixelStatistics
    teacher_pixels: PixelStatistics


def resolve_images(
    student: nn.Module,
    teacher: nn.Module,
    *,
    size: tuple[int, int] | None,
    resize: Resize,
    student_pixels: PixelStatistics | None,
    teacher_pixels: PixelStatistics | None,
) -> PairImages:
    """Settle what the user leaves open by what timm says of both networks.

    Args:
        student: Network of timm, or any other.
        teacher: Network of timm, or any other.
        size: (h, w) of the student's images; None asks the student.
        resize: ``auto`` allows other images for the teacher than the student's, ``none`` does not.
        student_pixels: Mean and standard deviation; None asks the student.
        teacher_pixels: Mean and standard deviation; None asks the teacher.

    Raises:
        ConfigError: If the sizes differ and ``resize`` is ``none``.
    """
    student_size = size or _input_size(student) or DEFAULT_SIZE
    return PairImages(
        student_size=student_size,
        teacher_size=_teacher_size(teacher, student_size, resize),
        student_pixels=student_pixels or normalisation(student),
        teacher_pixels=teacher_pixels or normalisation(teacher),
    )


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels that a model expects, per channel."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("mean", IMAGENET[0])), tuple(cfg.get("std", IMAGENET[1]))


def _input_size(model: nn.Module) -> tuple[int, int] | None:
    """(h, w) of the images that a model was built for, or None if it does not say."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size")
    embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(embed) if embed else (tuple(size[-2:]) if size else None)


def _teacher_size(model: nn.Module, size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """The size that the teacher sees: its own where it takes one size only."""
    embed: Any = getattr(model, "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    if fixed is None or tuple(fixed) == size or not getattr(embed, "strict_img_size", True):
        return size
    if resize == "none":
        raise ConfigError(
            f"the teacher takes {fixed[0]}x{fixed[1]} pixels and the student's images have "
            f"{size[0]}x{size[1]}; use --teacher-resize auto, or build the teacher with img_size"
        )
    say(f"images are resized from {size[0]}x{size[1]} to {fixed[0]}x{fixed[1]} for the teacher")
    return tuple(fixed)
