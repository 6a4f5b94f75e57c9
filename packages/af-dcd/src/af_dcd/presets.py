"""Weights and settings of the method, per data set, from the released scripts (spec of each: README).

All share temperature 0.07, 16 groups, pooling 4, 4x4 patches, mask ratio 0.75 and T = 1. ``lambda_fd``
belongs to a summed error: 2e-6 on a 2048 x 64 x 128 map weighs like 33.6 on the mean.
"""

from ast import literal_eval
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from effml_common.errors import ConfigError
from effml_common.parsing import did_you_mean
from effml_common.settings import require, setting

Side = Literal["none", "student", "teacher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Settings of the method; the defaults are the released code's on Cityscapes.

    Raises:
        ConfigError: If a value is out of range.
    """

    lambda_kd: float = setting(1.0, "weight of logits distillation")
    lambda_fd: float = setting(2e-6, "weight of masked feature mimicking")
    lambda_ctr: float = setting(5e-3, "weight of the contrast")
    temperature: float = setting(1.0, "T of logits distillation")
    fd_reduction: Literal["sum", "mean"] = setting("sum", "how mimicking adds its squared errors")
    mask: Literal["random", "center"] = setting("random", "which positions mimicking zeroes")
    mask_ratio: float = setting(0.75, "share that the random mask zeroes")
    enhanced: bool = setting(False, "two-depth generator")
    hidden: int | None = setting(None, "inner channels of the generator; none: the teacher's")
    contrast: Literal["omni", "spatial", "channel"] = setting("omni", "what is contrasted")
    groups: int = setting(16, "M, channel groups (omni, channel)")
    patch: int | None = setting(4, "side of the patches (omni, spatial); none: the whole map")
    pool: int = setting(4, "max-pooling before the contrast")
    tau: float = setting(0.07, "temperature of the contrast")
    p: int = setting(1, "distance: 1 or 2")
    negatives: Literal["cross_group", "all"] = setting(
        "cross_group", "released code, or the paper's figure (omni, channel)"
    )
    crop_to_fit: bool = setting(False, "drop what patches leave over")
    resize: Literal["none", "student", "teacher"] = setting(
        "none", "side that is resized when feature or score maps differ in size"
    )
    impl: Literal["chunked", "naive"] = setting("chunked", "how the contrast is computed")

    def __post_init__(self) -> None:
        for name in ("lambda_kd", "lambda_fd", "lambda_ctr"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"{name} is {value}", "give 0 or more")
        for name in ("temperature", "tau"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}", "give above 0")
        require(
            0 <= self.mask_ratio < 1,
            f"mask_ratio is {self.mask_ratio}, and 1 would zero everything",
            "give a share in [0, 1)",
        )
        require(self.p in (1, 2), f"p is {self.p}", "give 1 or 2")
        for name in ("groups", "pool", "patch", "hidden"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}", "give 1 or more")
        for name, hint in get_type_hints(DistillConfig).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and isinstance(choices[0], str):
                require(value in choices, f"{name} is {value!r}", f"give {' or '.join(choices)}")

    @property
    def has_branch(self) -> bool:
        """Whether a generator is trained beside the student."""
        return self.lambda_fd > 0 or self.lambda_ctr > 0

    def contrast_settings(self) -> dict[str, Any]:
        """Arguments of ``omni_contrastive_loss``; spatial and channel contrast are cases of it."""
        form: dict[str, Any] = {
            "groups": self.groups, "patch": self.patch, "pool": self.pool, "tau": self.tau,
            "p": self.p, "negatives": self.negatives, "crop_to_fit": self.crop_to_fit,
            "impl": self.impl,
        }  # fmt: skip
        if self.contrast == "spatial":
            return {**form, "groups": 1, "negatives": "all"}
        return {**form, "patch": 1} if self.contrast == "channel" else form


def changed(config: DistillConfig, settings: dict[str, Any]) -> DistillConfig:
    """A copy with other values.

    Raises:
        ConfigError: If a name is unknown or a value out of range.
    """
    known = [field.name for field in fields(DistillConfig)]
    for name in settings:
        if name not in known:
            advice = did_you_mean(name, known, f"use one of {', '.join(known)}")
            raise ConfigError(f"the method has no setting {name!r}; {advice}")
    return replace(config, **settings)


def options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Values of ``name=value`` words: Python literals, or else text.

    Raises:
        ConfigError: If a word has no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{pair!r} is no setting; write name=value")
        words = {"true": True, "false": False, "none": None}
        try:
            found[name] = words[value] if value in words else literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


PRESETS: dict[str, DistillConfig] = {
    "cityscapes": DistillConfig(),
    # The released R18 script asks for this pair of options under names that its parser refuses.
    "cityscapes_r18": DistillConfig(mask="center", enhanced=True),
    "voc": DistillConfig(lambda_fd=1e-6),
    "camvid": DistillConfig(lambda_fd=8e-6, lambda_ctr=1e-2, pool=1, crop_to_fit=True),
    "ade20k": DistillConfig(lambda_kd=0.5, lambda_fd=1e-6, lambda_ctr=4e-2),
    "coco_stuff164k": DistillConfig(lambda_kd=0.5, lambda_fd=5e-6),
    # Inferred from the paper's figure and ablation: L2, and every other vector as a negative.
    "paper": DistillConfig(p=2, negatives="all"),
}
