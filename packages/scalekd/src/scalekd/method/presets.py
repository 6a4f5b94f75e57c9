"""Settings of the released pairs, and the rules that stand in for them elsewhere.

The released weights multiply sums over tokens; here they are times the number of tokens (49 for Swin,
256 for EVA at 224 pixels), since the losses are means.
"""

from dataclasses import dataclass

from scalekd.method.feature_mimicking import View


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What the paper's configuration of one pair sets.

    Attributes:
        teacher: Start of the timm name.
        student: Start of the timm name.
        heads: Of the stage-3 and stage-4 projectors.
        tau: Sharpness.
        summed: (full, ac) weights of the summed losses.
        tokens: Number of teacher tokens they were made for.
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
    stem_norm: str = "bn"
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


def find_preset(teacher: str, student: str) -> Preset | None:
    """The released pair that two architecture names belong to."""
    for preset in PRESETS:
        if teacher.startswith(preset.teacher) and student.startswith(preset.student):
            return preset
    return None


def auto_heads(width: int, head_width: int = 64) -> int:
    """Number of heads whose width is nearest 64, among those that divide ``width``."""
    return min(
        (h for h in range(1, width + 1) if width % h == 0),
        key=lambda h: (abs(width / h - head_width), h),
    )


def auto_tau(student_kind: str, plain_teacher: bool) -> float:
    """Sharpness by kind of student: the pattern of the released pairs."""
    if plain_teacher:
        return 0.2 if student_kind == "cnn" else 1.0
    return 1.0 if student_kind in ("convnext", "swin") else 5.0


def auto_weights(plain_teacher: bool) -> tuple[float, float]:
    """(full, ac) weights of the mean losses: 49 (.08, .06) for a hierarchy, 256 (.016, .008)."""
    return (4.1, 2.05) if plain_teacher else (3.92, 2.94)


def term_weights(
    full: float, ac: float, *, tpp: bool, dfm: bool, ac4: bool
) -> dict[tuple[str, View], float]:
    """Factor of each term that takes part."""
    stages = ("s3", "s4") if tpp else ("s4",)
    weights: dict[tuple[str, View], float] = {(stage, "full"): full for stage in stages}
    if dfm:
        weights |= {(stage, "ac"): ac for stage in stages if stage == "s3" or ac4}
    return {term: weight for term, weight in weights.items() if weight > 0}
