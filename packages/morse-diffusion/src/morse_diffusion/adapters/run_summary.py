"""What a run did: proof that Morse was active."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from effml_common.device import synchronize
from effml_common.logging import warn
from morse_diffusion.method.schedule import MorsePlan


@dataclass
class RunSummary:
    """Steps by kind with their measured times, and the plan they followed.

    Args:
        plan: The plan of the run.
        milliseconds: Times of the steps by kind, ``Dash`` and ``Dot``, in order.

    >>> summary = RunSummary(MorsePlan(3, (0, 2)))
    >>> for kind, seconds in (("Dash", 0.008), ("Dot", 0.002), ("Dash", 0.008)):
    ...     summary.record(kind, seconds, new_step=True)
    >>> summary.speed_ratio, summary.to_json()["effective_lsd"]
    (4.0, 2.25)
    """

    plan: MorsePlan
    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {"Dash": [], "Dot": []})

    def record(self, kind: str, seconds: float, new_step: bool) -> None:
        """Add one call; a further call of the same step adds to its time."""
        times = self.milliseconds[kind]
        if new_step or not times:
            times.append(0.0)
        times[-1] += 1e3 * seconds

    def steps(self, kind: str) -> int:
        """Return the number of steps of one kind."""
        return len(self.milliseconds[kind])

    def per_step(self, kind: str) -> float | None:
        """Return the median milliseconds of a step; None if there was none."""
        times = self.milliseconds[kind]
        return median(times) if times else None

    @property
    def speed_ratio(self) -> float | None:
        """Measured N; None until both kinds have run."""
        dash, dot = self.per_step("Dash"), self.per_step("Dot")
        return dash / dot if dash and dot else None

    def to_json(self) -> dict[str, Any]:
        """Return counts, pattern, times, N and effective LSD."""
        n = self.speed_ratio
        return {
            "pattern": self.plan.pattern,
            "dash_steps": self.steps("Dash"),
            "dot_steps": self.steps("Dot"),
            "ms_per_dash_step": self.per_step("Dash"),
            "ms_per_dot_step": self.per_step("Dot"),
            "N": n,
            "effective_lsd": self.steps("Dash") + self.steps("Dot") / n if n else None,
        }

    def warn_if_idle(self) -> None:
        """Warn if a run made no Dot step, because such a run gains nothing."""
        if self.steps("Dash") and not self.steps("Dot"):
            warn("Morse was on, but the run made no Dot step: nothing was sped up")

    def __str__(self) -> str:
        values = self.to_json()
        if not values["dash_steps"]:
            return f"Morse: no run yet; the plan is {self.plan.pattern}"
        text = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in values.items()}
        return (
            f"Morse: {text['pattern']}; {text['dash_steps']} Dash steps of "
            f"{text['ms_per_dash_step']} ms, {text['dot_steps']} Dot steps of "
            f"{text['ms_per_dot_step']} ms; N {text['N']}, "
            f"effective LSD {text['effective_lsd']}"
        )


def clock(device: torch.device) -> float:
    """Return seconds, after the device has done what was asked of it."""
    synchronize(device)
    return time.perf_counter()
