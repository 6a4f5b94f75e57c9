"""The three terms of Af-DCD on one pair of feature maps and one pair of class scores.

L = L_task + lambda_kd L_kd + lambda_fd L_fd + lambda_ctr L_ctr
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from af_dcd.config import DistillConfig, Side
from af_dcd.method.contrast import as_patches, omni_contrastive_loss, pair_mask, without_autocast
from af_dcd.method.logits_kd import logits_kd_loss
from af_dcd.method.mimicking import MaskedGeneration, feature_loss
from effml_common.errors import InputError


class AfDCDLoss(nn.Module):
    """Align and generate (trained, dropped at inference), then mimic and contrast.

    Contrast acts on the generated map, so its gradient reaches the generator, the alignment and the
    student. Under autocast the alignment and the generator, the dear part, run in half precision; the
    losses stay in float32, where a summed error cannot overflow.

    Args:
        c_s: Channels of the student's features.
        c_t: Channels of the teacher's.
        config: Settings.
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
        """Weighted terms ``loss_fd`` and ``loss_ctr``, those whose weight is above 0.

        Raises:
            InputError: If the maps differ in size and ``resize`` is none, or patches do not fit.
        """
        config = self.config
        wide = torch.promote_types(student.dtype, torch.float32)
        fs, ft = same_size(student.to(wide), teacher.detach().to(wide), config.resize)
        generated = self.generation(fs)
        with without_autocast(student.device):
            generated = generated.to(wide)
            terms = {}
            if config.lambda_fd > 0:
                error = feature_loss(generated, ft, config.fd_reduction)
                terms["loss_fd"] = config.lambda_fd * error
            if config.lambda_ctr > 0:
                contrast = omni_contrastive_loss(generated, ft, **config.contrast_settings())
                terms["loss_ctr"] = config.lambda_ctr * contrast
            return terms


def kd_term(student: Tensor, teacher: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """Weighted ``loss_kd`` of class scores [b, k, h, w], or nothing where its weight is 0."""
    if config.lambda_kd == 0:
        return {}
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"the student has {student.shape[1]} classes and the teacher {teacher.shape[1]}; "
            "give a teacher of the same classes, or lambda_kd=0"
        )
    zs, zt = same_size(student.float(), teacher.float(), config.resize)
    return {"loss_kd": config.lambda_kd * logits_kd_loss(zs, zt, config.temperature)}


def same_size(student: Tensor, teacher: Tensor, resize: Side) -> tuple[Tensor, Tensor]:
    """Bring two maps to one height and width, bilinearly, on the side that ``resize`` names.

    Raises:
        InputError: If they differ and ``resize`` is none.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if resize == "student":
        return _resized(student, teacher), teacher
    if resize == "teacher":
        return student, _resized(teacher, student)
    sizes = [f"{x.shape[2]}x{x.shape[3]}" for x in (student, teacher)]
    raise InputError(
        f"the student's map is {sizes[0]} and the teacher's {sizes[1]}; "
        "tap layers of one stride, or set resize to student or teacher"
    )


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def check_fit(shape: Sequence[int], config: DistillConfig) -> None:
    """See, without any data, that a teacher map of shape [c, h, w] can be contrasted.

    Raises:
        InputError: As ``omni_contrastive_loss`` would at the first step.
    """
    if config.lambda_ctr > 0:
        form = config.contrast_settings()
        cut = [form[name] for name in ("groups", "patch", "pool", "crop_to_fit")]
        probe = torch.zeros(1, *shape)
        pair_mask(as_patches(probe, *cut).shape[1], form["groups"], form["negatives"])
