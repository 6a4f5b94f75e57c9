"""Which settings a pair gets: the released ones, or the rules that stand in for them elsewhere.

The released weights multiply sums over tokens; here they are times the number of tokens (49 for Swin,
256 for EVA at 224 pixels), since the losses are means. A newly released pair goes into ``PRESETS``.
"""

from dataclasses import dataclass

from effml_common.errors import ConfigError
from scalekd.config import ScaleKDConfig
from scalekd.method.feature_mimicking import View
from scalekd.method.projector import StemNorm

RELEASED_KD_ALPHA = 0.5  # share of the logit term in the released configurations
HEAD_WIDTH = 64  # channels of an attention head that the rule aims at


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What the paper's configuration of one pair sets.

    Attributes:
        teacher: Start of the timm name.
        student: Start of the timm name.
        heads: Heads of the stage-3 and stage-4 projectors.
        tau: Sharpness of their attention.
        summed: (full, ac) weights of the summed losses.
        tokens: Number of teacher tokens that the weights were tuned for.
        ac4: Whether the ac view has a stage-4 term.
        stem_norm: Norm in the stem of the projectors.
        kd: Whether the logit term is on.
    """

    teacher: str
    student: str
    heads: tuple[int, int]
    tau: float
    summed: tuple[float, float] = (0.08, 0.06)
    tokens: int = 49
    ac4: bool = True
    stem_norm: StemNorm = "bn"
    kd: bool = True

    @property
    def weights(self) -> tuple[float, float]:
        """(full, ac) weights of the mean losses."""
        return self.summed[0] * self.tokens, self.summed[1] * self.tokens


SWIN_L, EVA_L = "swin_large_patch4_window7", "eva_large_patch14"
_EVA = {"summed": (0.016, 0.008), "tokens": 256}
PRESETS = (
    Preset(teacher=SWIN_L, student="resnet50", heads=(16, 24), tau=5),
    Preset(teacher=SWIN_L, student="mobilenetv1", heads=(16, 24), tau=5),
    Preset(teacher=SWIN_L, student="convnext_tiny", heads=(8, 16), tau=1),
    Preset(teacher=SWIN_L, student="swin_tiny", heads=(24, 48), tau=1, stem_norm="ln"),
    Preset(teacher=SWIN_L, student="mixer_", heads=(8, 8), tau=5),
    Preset(teacher=SWIN_L, student="vit_", heads=(8, 8), tau=5),
    Preset(teacher="swin_base_patch4_window7", student="resnet50", heads=(8, 16), tau=5),
    Preset(
        teacher="swin_small_patch4_window7",
        student="resnet50",
        heads=(3, 6),
        tau=5,
        ac4=False,
        kd=False,
    ),
    Preset(teacher=EVA_L, student="resnet50", heads=(8, 8), tau=0.2, **_EVA),
    Preset(teacher=EVA_L, student="mixer_", heads=(8, 8), tau=1, **_EVA),
    Preset(teacher=EVA_L, student="vit_", heads=(8, 8), tau=1, **_EVA),
    Preset(
        teacher=EVA_L, student="eva02_small", heads=(8, 8), tau=1, summed=(0.008, 0.004), tokens=576
    ),
)


@dataclass(frozen=True, kw_only=True)
class PairTraits:
    """What the settings of a pair depend on.

    Attributes:
        teacher: Architecture name of the teacher.
        student: Architecture name of the student.
        student_kind: cnn, convnext, swin, mlp or vit.
        plain_teacher: Whether the teacher is a plain transformer rather than a hierarchy.
        split_width: Channels at the input of the teacher's tail.
        final_width: Channels at its output.
        final_tokens: Number of the teacher's final tokens.
        student_classes: Number of the student's classes.
        teacher_classes: Number of the teacher's classes; None where it has no classifier.
    """

    teacher: str
    student: str
    student_kind: str
    plain_teacher: bool
    split_width: int
    final_width: int
    final_tokens: int
    student_classes: int
    teacher_classes: int | None


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """The method's settings for one pair; nothing is left open.

    Attributes:
        heads: Heads of the stage-3 and stage-4 projectors.
        tau: Sharpness of their attention.
        weights: Factor of each term, by stage and view.
        stem_norm: Norm in the stem of the projectors.
        kd_alpha: Share of the logit term; 0 is off.
        released: Whether the paper has this pair.
        ac_impossible: Whether the ac view is off only because the teacher has a single token.
    """

    heads: tuple[int, int]
    tau: float
    weights: dict[tuple[str, View], float]
    stem_norm: StemNorm
    kd_alpha: float
    released: bool
    ac_impossible: bool


def resolve_settings(config: ScaleKDConfig, pair: PairTraits) -> PairSettings:
    """Settle what a configuration leaves open: the released value, else the rule.

    Raises:
        ConfigError: If the number of heads does not divide a width of the teacher, or the classes of
            the two differ with the logit term.
    """
    preset = find_preset(pair.teacher, pair.student)

    # Weights of the two views. The mean of a single token is the token, so its ac view is zero.
    full, ac = preset.weights if preset else default_weights(pair.plain_teacher)
    full = full if config.w_full is None else config.w_full
    ac = ac if config.w_ac is None else config.w_ac
    dfm_wanted = config.use_dfm and ac > 0
    dfm = dfm_wanted and pair.final_tokens > 1
    ac4 = preset.ac4 if preset else True

    # The projectors.
    heads = config.heads or (preset.heads if preset else ())
    heads = heads or (default_heads(pair.split_width), default_heads(pair.final_width))
    check_heads(heads, (pair.split_width, pair.final_width))
    default_sharpness = default_tau(pair.student_kind, pair.plain_teacher)
    default_norm: StemNorm = preset.stem_norm if preset else "bn"

    # The logit term needs a teacher that classifies, and the same classes.
    alpha = config.kd_alpha
    if alpha is None:
        kd = pair.teacher_classes is not None and (preset is None or preset.kd)
        alpha = RELEASED_KD_ALPHA if kd else 0.0
    if alpha and pair.student_classes != pair.teacher_classes:
        raise ConfigError(
            f"the student has {pair.student_classes} classes and the teacher "
            f"{pair.teacher_classes or 0}, but the logit term is on; use --kd-alpha 0, or a teacher "
            "with the same classes"
        )

    return PairSettings(
        heads=(heads[0], heads[1]),
        tau=config.tau or (preset.tau if preset else default_sharpness),
        weights=term_weights(full, ac, tpp=config.use_tpp, dfm=dfm, ac4=ac4),
        stem_norm=default_norm if config.stem_norm == "auto" else config.stem_norm,
        kd_alpha=alpha,
        released=preset is not None,
        ac_impossible=dfm_wanted and not dfm,
    )


def find_preset(teacher: str, student: str) -> Preset | None:
    """Return the released pair that two architecture names belong to, if there is one."""
    for preset in PRESETS:
        if teacher.startswith(preset.teacher) and student.startswith(preset.student):
            return preset
    return None


def default_weights(plain_teacher: bool) -> tuple[float, float]:
    """(full, ac) weights of the mean losses: 49 (.08, .06) for a hierarchy, 256 (.016, .008)."""
    return (4.1, 2.05) if plain_teacher else (3.92, 2.94)


def default_heads(width: int) -> int:
    """Return the number of heads whose width is nearest 64, among those that divide ``width``."""
    return min(
        (h for h in range(1, width + 1) if width % h == 0),
        key=lambda h: (abs(width / h - HEAD_WIDTH), h),
    )


def check_heads(heads: tuple[int, ...], widths: tuple[int, int]) -> None:
    """Refuse numbers of heads that do not divide the channels of their stage.

    Raises:
        ConfigError: With the numbers that would do.
    """
    for stage, width, count in zip(("s3", "s4"), widths, heads, strict=True):
        if count < 1 or width % count:
            valid = ", ".join(str(h) for h in range(1, width + 1) if width % h == 0)
            raise ConfigError(
                f"{count} heads do not divide the {width} channels of {stage}; use one of {valid}"
            )


def default_tau(student_kind: str, plain_teacher: bool) -> float:
    """Sharpness by kind of student: the pattern of the released pairs."""
    if plain_teacher:
        return 0.2 if student_kind == "cnn" else 1.0
    return 1.0 if student_kind in ("convnext", "swin") else 5.0


def term_weights(
    full: float, ac: float, *, tpp: bool, dfm: bool, ac4: bool
) -> dict[tuple[str, View], float]:
    """Return the factor of each term that takes part, by stage and view."""
    stages = ("s3", "s4") if tpp else ("s4",)
    weights: dict[tuple[str, View], float] = {(stage, "full"): full for stage in stages}
    if dfm:
        weights |= {(stage, "ac"): ac for stage in stages if stage == "s3" or ac4}
    return {term: weight for term, weight in weights.items() if weight > 0}
