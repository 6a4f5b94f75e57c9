"""Fit a method's settings to a teacher and a student by looking at one forward pass of each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effml_common.errors import ConfigError
from effml_common.logging import warn
from scalekd.adapters.student import StudentTap, kind_of
from scalekd.adapters.teacher import TeacherOut, TeacherSplit
from scalekd.config import ScaleKDConfig
from scalekd.method.parameter_perception import MimicShape
from scalekd.method.presets import auto_heads, auto_tau, auto_weights, find_preset, term_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALPHA = 0.5  # share of the logit term in the released configurations


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A pair, resolved.

    Attributes:
        shape: What the projectors are built from.
        kd_alpha: Share of the logit term; 0 is off.
        kd_t: Its temperature.
        preset: Whether the paper has this pair.
    """

    shape: MimicShape
    kd_alpha: float
    kd_t: float
    preset: bool


def architecture(model: nn.Module) -> str:
    """The name that timm has for a model without its tag, or the class name."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__.lower().replace("mlpmixer", "mixer_")


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that a model was made for."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("mean", IMAGENET[0])), tuple(cfg.get("std", IMAGENET[1]))


@torch.no_grad()
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
    """
    out, logits, s3, s4 = dry_run(teacher, student, student_size, teacher_size)
    return plan_of(teacher, student, config, out, logits, (s3, s4))


def dry_run(
    teacher: TeacherSplit,
    student: StudentTap,
    student_size: tuple[int, int],
    teacher_size: tuple[int, int],
) -> tuple[TeacherOut, Tensor, Tensor, Tensor]:
    """One zero image through both; the student's mode and statistics stay as they were."""
    like = next(student.parameters())
    before = student.training
    student.eval()
    try:
        x = torch.zeros(1, 3, *student_size, device=like.device, dtype=like.dtype)
        logits, s3, s4 = student(x)
    finally:
        student.train(before)
    t = next(teacher.model.parameters())
    out = teacher.forward(torch.zeros(1, 3, *teacher_size, device=t.device, dtype=t.dtype))
    return out, logits, s3, s4


def plan_of(
    teacher: TeacherSplit,
    student: StudentTap,
    config: ScaleKDConfig,
    out: TeacherOut,
    logits: Tensor,
    maps: tuple[Tensor, Tensor],
) -> Plan:
    """As ``plan_pair``, from the outputs of a dry run."""
    preset = find_preset(architecture(teacher.model), architecture(student.model))
    plain, kind = teacher.plain, kind_of(student.model)
    full, ac = preset.weights if preset else auto_weights(plain)
    full = full if config.w_full is None else config.w_full
    ac = ac if config.w_ac is None else config.w_ac
    split_dim, final_dim = out.split.shape[-1], out.tokens.shape[-1]
    dfm = config.use_dfm and ac > 0
    if dfm and out.tokens.shape[1] == 1:
        warn("the teacher has one token: the ac view would be zero and is switched off")
        dfm = False
    heads = config.heads or (preset.heads if preset else ())
    heads = heads or (auto_heads(split_dim), auto_heads(final_dim))
    for name, width, count in zip(("s3", "s4"), (split_dim, final_dim), heads, strict=True):
        if count < 1 or width % count:
            valid = ", ".join(str(h) for h in range(1, width + 1) if width % h == 0)
            raise ConfigError(
                f"{count} heads do not divide the {width} channels of {name}; use one of {valid}"
            )
    shape = MimicShape(
        student=tuple((m.shape[1], (m.shape[2], m.shape[3])) for m in maps),  # pyright: ignore[reportArgumentType]
        split=(split_dim, out.context.grid),
        final=(final_dim, out.grid),
        heads=(heads[0], heads[1]),
        tau=config.tau or (preset.tau if preset else auto_tau(kind, plain)),
        weights=term_weights(
            full, ac, tpp=config.use_tpp, dfm=dfm, ac4=preset.ac4 if preset else True
        ),
        stem_norm=_stem_norm(config, preset),
        tpp=config.use_tpp,
    )
    alpha = config.kd_alpha
    if alpha is None:
        alpha = ALPHA if (preset is None or preset.kd) and out.logits is not None else 0.0
    _check_classes(alpha, logits, out.logits)
    return Plan(shape=shape, kd_alpha=alpha, kd_t=config.kd_t, preset=preset is not None)


def _stem_norm(config: ScaleKDConfig, preset: Any) -> Any:
    if config.stem_norm != "auto":
        return config.stem_norm
    return preset.stem_norm if preset else "bn"


def _check_classes(alpha: float, student: Tensor, teacher: Tensor | None) -> None:
    if alpha == 0:
        return
    count = 0 if teacher is None else teacher.shape[-1]
    if student.shape[-1] != count:
        raise ConfigError(
            f"the student has {student.shape[-1]} classes and the teacher {count}, but the logit "
            "term is on; use --kd-alpha 0, or a teacher with the same classes"
        )
