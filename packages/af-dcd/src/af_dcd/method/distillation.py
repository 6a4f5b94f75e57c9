"""The three terms of Af-DCD on one pair of feature maps and one pair of class scores.

    L = L_task + lambda_kd L_kd + lambda_fd L_fd + lambda_ctr L_ctr

L_kd compares class scores (``logits_kd``), L_fd the regenerated map with the teacher's (``mimicking``),
and L_ctr contrasts the two vector by vector (``contrast``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from af_dcd.config import DistillConfig, Side
from af_dcd.method.contrast import (
    omni_contrastive_loss,
    pair_mask,
    patch_vectors,
    without_autocast,
)
from af_dcd.method.logits_kd import logits_kd_loss
from af_dcd.method.mimicking import MaskedGeneration, feature_loss
from effml_common.errors import InputError


class AfDCDLoss(nn.Module):
    """Align and generate (trained, dropped at inference), then mimic and contrast.

    The contrast acts on the generated map, so its gradient reaches the generator, the alignment and the
    student. Under autocast the alignment and the generator, which cost most, run in half precision; the
    losses stay in float32, where a summed error cannot overflow.

    Args:
        c_s: Channels of the student's features.
        c_t: Channels of the teacher's.
        config: Settings.

    >>> import torch
    >>> branch = AfDCDLoss(4, 8, DistillConfig(groups=4, pool=1))
    >>> sorted(branch(torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)))
    ['loss_ctr', 'loss_fd']
    """

    def __init__(self, c_s: int, c_t: int, config: DistillConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DistillConfig()
        self.generation = MaskedGeneration(
            c_s,
            c_t,
            mask_ratio=config.mask_ratio,
            mask=config.mask,
            enhanced=config.enhanced,
            hidden=config.hidden,
        )

    def forward(
        self, student: Float[Tensor, "b c_s h w"], teacher: Float[Tensor, "b c_t h2 w2"]
    ) -> dict[str, Tensor]:
        """Compute the weighted terms ``loss_fd`` and ``loss_ctr``, those whose weight is above 0.

        Raises:
            InputError: If the maps differ in size and ``resize`` is none, or patches do not fit.
        """
        # Regenerate the teacher's map from the student's masked one.
        config = self.config
        dtype = torch.promote_types(student.dtype, torch.float32)
        student_map, teacher_map = resize_to_match(
            student.to(dtype), teacher.detach().to(dtype), config.resize
        )
        generated = self.generation(student_map)

        # Compare the two, outside of autocast.
        with without_autocast(student.device):
            generated = generated.to(dtype)
            terms = {}
            if config.lambda_fd > 0:
                error = feature_loss(generated, teacher_map, config.fd_reduction)
                terms["loss_fd"] = config.lambda_fd * error
            if config.lambda_ctr > 0:
                settings = config.contrast_settings()
                contrast = omni_contrastive_loss(generated, teacher_map, **settings)
                terms["loss_ctr"] = config.lambda_ctr * contrast
            return terms


def kd_term(student: Tensor, teacher: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """Compute the weighted ``loss_kd`` of class scores [b, k, h, w]; nothing where its weight is 0.

    Raises:
        InputError: If the models have different classes, or their maps differ in size and ``resize``
            is none.
    """
    if config.lambda_kd == 0:
        return {}
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"the student has {student.shape[1]} classes and the teacher {teacher.shape[1]}; "
            "give a teacher of the same classes, or lambda_kd=0"
        )
    zs, zt = resize_to_match(student.float(), teacher.float(), config.resize)
    return {"loss_kd": config.lambda_kd * logits_kd_loss(zs, zt, config.temperature)}


def resize_to_match(student: Tensor, teacher: Tensor, resize: Side) -> tuple[Tensor, Tensor]:
    """Bring two maps to one height and width, bilinearly, on the side that ``resize`` names.

    Raises:
        InputError: If they differ and ``resize`` is none.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if resize == "student":
        return _interpolate(student, teacher), teacher
    if resize == "teacher":
        return student, _interpolate(teacher, student)
    sizes = [f"{x.shape[2]}x{x.shape[3]}" for x in (student, teacher)]
    raise InputError(
        f"the student's map is {sizes[0]} and the teacher's {sizes[1]}; "
        "tap layers of one stride, or set resize to student or teacher"
    )


def _interpolate(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def contrast_shape(map_shape: Sequence[int], config: DistillConfig) -> torch.Size:
    """Count what is contrasted in one teacher map [c, h, w]: patches, vectors of a patch, channels.

    Raises:
        InputError: If groups or patches do not divide the map.
    """
    settings = config.contrast_settings()
    arguments = [settings[name] for name in ("groups", "patch", "pool", "crop_to_fit")]
    return patch_vectors(torch.zeros(1, *map_shape, device="meta"), *arguments).shape


def check_contrast_fits(map_shape: Sequence[int], config: DistillConfig) -> None:
    """See, without any data, that a teacher map of shape [c, h, w] can be contrasted.

    Raises:
        InputError: As ``omni_contrastive_loss`` would at the first step.
    """
    if config.lambda_ctr > 0:
        settings = config.contrast_settings()
        _, vectors, _ = contrast_shape(map_shape, config)
        pair_mask(vectors, settings["groups"], settings["negatives"])
