"""Which steps the Dash evaluates, and which the Dot fills in (section 3.3 of the Morse paper).

Latency is counted in LSD: one Dash step costs 1, one Dot step 1/N. A plan of ``d`` Dash and ``D`` Dot
steps costs d + D/N.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effml_common.logging import warn
from morse_diffusion.errors import PlanError

LARGEST_SHARE = 0.7  # of the budget for Dot steps, past which the paper saw no gain
PAPER_EXPANSION = 2.5  # steps per LSD; the paper has 2 to 3
ROUNDING = 1e-9  # a hair of tolerance, or 0.7 * 10 would lose a step to rounding


@dataclass(frozen=True)
class MorsePlan:
    """A hashable order of Dash and Dot steps.

    Args:
        n_total: Steps of the sampler.
        dash_indices: Steps that the Dash evaluates, ascending; the first is 0.
        speed_ratio: N, how many Dot steps take the time of a Dash step; infinite if unknown.
        early: How ``dash_indices`` were spread, for ``rescaled``; see ``spread_indices``.

    Raises:
        PlanError: If the indices are empty, unsorted, repeated, out of range or do not begin at 0,
            or N is not above 1.

    >>> plan = MorsePlan.uniform(2, 4, speed_ratio=4)
    >>> plan.pattern, plan.lsd, plan.expansion
    ('DddDdd', 3.0, 2.0)
    """

    n_total: int
    dash_indices: tuple[int, ...]
    speed_ratio: float = math.inf
    early: float = 1.0

    def __post_init__(self) -> None:
        # The order: the first step is the Dash's, for the Dot corrects an estimate of the Dash.
        indices = self.dash_indices
        if not indices:
            raise PlanError("a plan without a Dash step has no estimate to build on; add index 0")
        if list(indices) != sorted(set(indices)):
            raise PlanError(f"dash indices {list(indices)} are unsorted or repeated; sort them")
        if indices[0] != 0:
            raise PlanError(f"the first step must be a Dash step, not {indices[0]}; add index 0")
        if indices[-1] >= self.n_total:
            raise PlanError(
                f"dash index {indices[-1]} is outside of {self.n_total} steps; "
                f"use 0 to {self.n_total - 1}"
            )

        if not self.speed_ratio > 1:
            raise PlanError(
                f"N is {self.speed_ratio}: the Dot is no faster than the Dash; "
                "use a Dot with more halvings (m) or narrower channels"
            )

    @staticmethod
    def uniform(dash_steps: int, dot_steps: int, speed_ratio: float = math.inf) -> "MorsePlan":
        """Spread the Dash steps evenly, the first one first, as the paper does; see ``spread``."""
        return MorsePlan.spread(dash_steps, dot_steps, speed_ratio)

    @staticmethod
    def spread(
        dash_steps: int, dot_steps: int, speed_ratio: float = math.inf, early: float = 1.0
    ) -> "MorsePlan":
        """Place the Dash steps by ``spread_indices``.

        Warns when more than 0.7 of the Dash steps that the same time would buy are given up for Dot
        steps: past that the paper saw no gain.

        Args:
            dash_steps: 1 or more.
            dot_steps: 0 or more.
            speed_ratio: N; infinite if unknown.
            early: See ``spread_indices``.

        Raises:
            PlanError: If a count or ``early`` is out of range, or N is not above 1.
        """
        if dash_steps < 1 or dot_steps < 0:
            raise PlanError(
                f"{dash_steps} Dash and {dot_steps} Dot steps; give at least 1 Dash step and 0 Dot"
            )
        total = dash_steps + dot_steps
        indices = spread_indices(dash_steps, total, early)
        plan = MorsePlan(total, indices, speed_ratio, early)
        if plan.share > LARGEST_SHARE:
            warn(
                f"{plan.share:.0%} of the budget goes to Dot steps; above {LARGEST_SHARE:.0%} "
                "no gain was seen, so use more Dash steps"
            )
        return plan

    @staticmethod
    def from_latency(
        milliseconds: float, profile: Mapping[str, float], early: float = 1.0
    ) -> "MorsePlan":
        """Make a plan that meets a time budget.

        Args:
            milliseconds: Time for the whole denoising loop.
            profile: Measured ``t_dash``, ``t_dot`` and ``t_sched`` in milliseconds per step; the
                scheduler's time counts for both kinds of step.
            early: See ``spread_indices``.

        Raises:
            PlanError: If the budget is below one Dash step, or a key is missing.
        """
        try:
            t_dash, t_dot = (profile[key] for key in ("t_dash", "t_dot"))
        except KeyError as error:
            raise PlanError(f"the profile lacks {error}; give t_dash, t_dot and t_sched") from None

        rest = profile.get("t_sched", 0.0)
        if not (t_dash > 0 and t_dot > 0 and rest >= 0):
            raise PlanError(f"times must be positive, got {dict(profile)}; measure them again")
        step = t_dash + rest
        return make_plan(milliseconds / step, step / (t_dot + rest), early=early)

    @property
    def dash_steps(self) -> int:
        """Number of Dash steps."""
        return len(self.dash_indices)

    @property
    def dot_steps(self) -> int:
        """Number of Dot steps."""
        return self.n_total - len(self.dash_indices)

    @property
    def lsd(self) -> float:
        """Cost in Dash steps."""
        return self.dash_steps + self.dot_steps / self.speed_ratio

    @property
    def share(self) -> float:
        """k/n: the part of the cost that is spent on Dot steps."""
        return 1 - self.dash_steps / self.lsd

    @property
    def expansion(self) -> float:
        """The paper's r: steps per LSD, the upper bound of the speed-up."""
        return self.n_total / self.lsd

    @property
    def pattern(self) -> str:
        """D for a Dash step, d for a Dot step."""
        dash = set(self.dash_indices)
        return "".join("D" if i in dash else "d" for i in range(self.n_total))

    def rescaled(self, n_total: int) -> "MorsePlan":
        """Return the same share of Dash steps, but at least one, over another number of steps."""
        if n_total == self.n_total:
            return self
        dash = min(n_total, max(1, round(self.dash_steps * n_total / self.n_total)))
        indices = spread_indices(dash, n_total, self.early)
        return MorsePlan(n_total, indices, self.speed_ratio, self.early)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; N is null when unknown."""
        known = math.isfinite(self.speed_ratio)
        return {
            "n_total": self.n_total,
            "dash_indices": list(self.dash_indices),
            "speed_ratio": self.speed_ratio if known else None,
            "early": self.early,
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "MorsePlan":
        """Read what ``to_json`` returned."""
        ratio = document.get("speed_ratio")
        return MorsePlan(
            int(document["n_total"]),
            tuple(document["dash_indices"]),
            math.inf if ratio is None else float(ratio),
            float(document.get("early", 1.0)),
        )


def spread_indices(dash_steps: int, n_total: int, early: float = 1.0) -> tuple[int, ...]:
    """Place d Dash steps among n_total: floor(n_total (j / d)^early), each after the last.

    Args:
        dash_steps: d, 1 to ``n_total``.
        n_total: Steps in all.
        early: 1 spreads them evenly, as the paper does. Above 1 they crowd at the noisy start, where a
            Dash estimate says little about the next one; not in the paper.

    Raises:
        PlanError: If ``early`` is below 1 or not finite.
    """
    if not 1 <= early < math.inf:
        raise PlanError(f"early is {early:g}; give 1 for an even spread, or more, such as 1.5")
    indices = [0]
    for j in range(1, dash_steps):
        wanted = math.floor(n_total * (j / dash_steps) ** early + ROUNDING)
        indices.append(max(indices[-1] + 1, wanted))
    return tuple(indices)


def make_plan(
    budget: float,
    speed_ratio: float,
    r: float | None = None,
    min_dash: int = 1,
    early: float = 1.0,
) -> MorsePlan:
    """Split a budget of n LSD into n - k Dash steps and N k Dot steps.

    k = n (r - 1) / (N - 1), so that the run has r n steps in all.

    Args:
        budget: n, in LSD; need not be a whole number.
        speed_ratio: N, measured on the device at hand.
        r: Steps per LSD. Default 2.5 (the paper: 2 to 3), less when N is small, so that at most half
            of the budget goes to Dot steps.
        min_dash: Fewest Dash steps.
        early: See ``spread_indices``.

    Raises:
        PlanError: If the budget is below one LSD, or N is not above 1.

    >>> make_plan(10, speed_ratio=6).pattern
    'DddDdddDddDdddDddDdddDddd'
    """
    # What can be asked for with this N.
    if not speed_ratio > 1 or not math.isfinite(speed_ratio):
        raise PlanError(f"N is {speed_ratio}; it must be finite and above 1, so measure it")
    if not min_dash <= budget < math.inf:
        raise PlanError(f"a budget of {budget:g} LSD is too small; give at least {min_dash} LSD")
    if r is None:
        r = min(PAPER_EXPANSION, 1 + (speed_ratio - 1) / 2)
    if not 1 <= r <= speed_ratio:
        raise PlanError(f"r is {r:g}; give 1 (no Dot step) to N = {speed_ratio:g}")
    if r > 1 and budget < 1 + 1 / speed_ratio:
        raise PlanError(
            f"{budget:g} LSD leave no time for a Dot step; give at least "
            f"{1 + 1 / speed_ratio:.3g} LSD, or r=1 for Dash steps alone"
        )

    # Dash steps: n - k, rounded; one less where a large N makes k round to nothing.
    k = budget * (r - 1) / (speed_ratio - 1)
    dash = max(min_dash, math.floor(budget - k + 0.5))
    if r > 1 and (budget - dash) * speed_ratio < 1 and dash > min_dash:
        dash -= 1

    # Dot steps: what r asks for, as far as the rest of the budget pays for it.
    affordable = math.floor((budget - dash) * speed_ratio + ROUNDING)
    wanted = math.floor(r * budget + ROUNDING) - dash
    dots = max(0, min(affordable, wanted))
    return MorsePlan.spread(dash, dots, speed_ratio, early)
