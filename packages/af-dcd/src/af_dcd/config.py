"""Settings of the commands: defaults, units and checks, once. Those of the method are in ``presets``."""

from dataclasses import dataclass
from typing import Literal

from effml_common.settings import require, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """The drawn scenes and the two networks that the demo compares on."""

    teacher_width: int = setting(24, "channels of the teacher's first stage")
    teacher_scenes: int = setting(400, "scenes that the teacher is trained on")
    teacher_steps: int = setting(1500, "updates of the teacher")
    student_width: int = setting(8, "channels of the student's first stage")
    scenes: int = setting(24, "labelled scenes that students are trained on")
    batch: int = setting(8, "crops per update")
    crop: int = setting(64, "side of a training crop, in pixels")

    def __post_init__(self) -> None:
        for name in PairConfig.__dataclass_fields__:
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give a positive count")
        require(
            self.crop % 16 == 0 and self.crop <= 96, f"crop is {self.crop}", "give 16, 32 .. 96"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig(PairConfig):
    """Distil a small segmenter on drawn scenes and compare with other ways to train it."""

    steps: int = setting(500, "updates of a student")
    seeds: int = setting(1, "seeds of init, crops and masks; claims need 3")
    tests: int = setting(100, "scenes that everything is measured on")
    out: str | None = setting(None, "folder; default runs/demo-<time>")

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        for name in ("steps", "seeds", "tests"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give a positive count")
