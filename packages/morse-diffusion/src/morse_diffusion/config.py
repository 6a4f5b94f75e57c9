"""Every setting of morse-diffusion: its default, its unit and its check, once."""

from dataclasses import dataclass, field
from typing import Any, Literal

from effml_common.errors import ConfigError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _require(condition: bool, problem: str, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DashConfig:
    """The small denoiser that the demo trains once."""

    data: Literal["digits", "shapes"] = _setting(
        "digits", "digits up-sampled to 32x32, or drawn RGB shapes"
    )
    widths: tuple[int, ...] = _setting((32, 64, 64), "channels of the demo denoiser's levels")
    dash_steps: int = _setting(1500, "updates of the demo denoiser's training")
    dash_batch: int = _setting(32, "images per update of the demo denoiser")
    dash_lr: float = _setting(1.5e-3, "peak learning rate of the demo denoiser")
    dash_seed: int = _setting(0, "seed of the demo denoiser")

    def __post_init__(self) -> None:
        _require(
            len(self.widths) >= 2 and all(w > 0 and w % 8 == 0 for w in self.widths),
            f"widths must be two or more positive multiples of 8, got {list(self.widths)}",
            "use 32 64 64",
        )
        for name in ("dash_steps", "dash_batch"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be 1 or more, got {value}", "give a positive count")
