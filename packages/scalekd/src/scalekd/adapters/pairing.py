"""Fit the method to a teacher and a student by looking at one forward pass of each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effml_common.logging import warn
from scalekd.adapters.student import StudentTap
from scalekd.adapters.student_families import kind_of
from scalekd.adapters.teacher import TeacherOut, TeacherSplit
from scalekd.config import ScaleKDConfig
from scalekd.method.parameter_perception import MimicShape
from scalekd.method.presets import PairTraits, resolve_settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pair for which nothing is left open.

    Attributes:
        shape: What the projectors are built from.
        kd_alpha: Share of the logit term; 0 is off.
        kd_t: Temperature of the logit term.
        preset: Whether the paper has this pair.
    """

    shape: MimicShape
    kd_alpha: float
    kd_t: float
    preset: bool


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What one image without content gives in both networks.

    Attributes:
        teacher: The teacher's pass.
        logits: Of the student, [1, classes].
        s3: The student's map S3, [1, c, h, w].
        s4: The student's map S4.
        student_image: The image that the student saw, [1, 3, h, w].
        teacher_image: The image that the teacher saw.
    """

    teacher: TeacherOut
    logits: Tensor
    s3: Tensor
    s4: Tensor
    student_image: Tensor
    teacher_image: Tensor


def plan_pair(
    teacher: TeacherSplit,
    student: StudentTap,
    config: ScaleKDConfig,
    student_size: tuple[int, int],
    teacher_size: tuple[int, int],
) -> Plan:
    """Read the shapes off a dry run and settle what the configuration leaves open.

    Args:
        teacher: On the same device as the student; the meta device works.
        student: Tapped student.
        config: Method.
        student_size: (h, w) of the student's images.
        teacher_size: (h, w) of the teacher's.

    Raises:
        ConfigError: If head counts do not divide the widths, or classes differ with the logit term.

    >>> from timm.models.swin_transformer import SwinTransformer
    >>> from timm.models.resnet import BasicBlock, ResNet
    >>> swin = SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=16,
    ...     depths=(1, 1), num_heads=(1, 1), num_classes=5)
    >>> resnet = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 12, 16))
    >>> plan = plan_pair(
    ...     TeacherSplit.from_timm(swin), StudentTap(resnet), ScaleKDConfig(), (32, 32), (32, 32)
    ... )
    >>> plan.shape.student, plan.shape.final, plan.kd_alpha
    (((12, (2, 2)), (16, (1, 1))), (32, (8, 8)), 0.5)
    """
    # What the two are, and the shapes of their features.
    teacher_name, student_name = architecture(teacher.model), architecture(student.model)
    kind = kind_of(student.model)
    shapes = dry_run(teacher, student, student_size, teacher_size)
    out = shapes.teacher

    # The released settings where the paper has this pair, rules elsewhere.
    traits = PairTraits(
        teacher=teacher_name,
        student=student_name,
        student_kind=kind,
        plain_teacher=teacher.plain,
        split_width=out.split.shape[-1],
        final_width=out.tokens.shape[-1],
        final_tokens=out.tokens.shape[1],
        student_classes=shapes.logits.shape[-1],
        teacher_classes=None if out.logits is None else out.logits.shape[-1],
    )
    settings = resolve_settings(config, traits)
    if settings.ac_impossible:
        warn("the teacher has one token: the ac view would be zero and is switched off")

    shape = MimicShape(
        student=tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in (shapes.s3, shapes.s4)),  # pyright: ignore[reportArgumentType]
        split=(traits.split_width, out.context.grid),
        final=(traits.final_width, out.grid),
        heads=settings.heads,
        tau=settings.tau,
        weights=settings.weights,
        stem_norm=settings.stem_norm,
        tpp=config.use_tpp,
    )
    return Plan(shape=shape, kd_alpha=settings.kd_alpha, kd_t=config.kd_t, preset=settings.released)


def architecture(model: nn.Module) -> str:
    """Return the name that timm has for a model without its tag, or the class name."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__.lower().replace("mlpmixer", "mixer_")


@torch.no_grad()
def dry_run(
    teacher: TeacherSplit,
    student: StudentTap,
    student_size: tuple[int, int],
    teacher_size: tuple[int, int],
) -> DryRun:
    """Run one zero image through both; the student's mode and statistics stay as they were."""
    # In evaluation mode, so that no statistic of a batch norm moves.
    parameter = next(student.parameters())
    student_image = parameter.new_zeros(1, 3, *student_size)
    mode = student.training
    student.eval()
    try:
        logits, s3, s4 = student(student_image)
    finally:
        student.train(mode)

    teacher_image = next(teacher.model.parameters()).new_zeros(1, 3, *teacher_size)
    return DryRun(
        teacher=teacher.forward(teacher_image),
        logits=logits,
        s3=s3,
        s4=s4,
        student_image=student_image,
        teacher_image=teacher_image,
    )
