"""Ways to sample that the demo, ``bench`` and the benchmarks compare at equal measured time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.deepcache import (
    DEEPCACHE_INTERVAL,
    affordable_deepcache_steps,
    deepcache_enabled,
)
from morse_diffusion.adapters.pixels import result_images
from morse_diffusion.adapters.timing import StepTimes
from morse_diffusion.method.sampler import Dot, ExtrapolationDot
from morse_diffusion.method.schedule import MorsePlan, make_plan

Kind = Literal["plain", "respaced", "morse", "extrapolate", "deepcache"]
EARLY = 1.5  # of methods that crowd their full steps at the noisy start
FREE_EXPANSION = 2.5  # steps per Dash step of the extrapolation, which costs nothing


@dataclass(frozen=True)
class SamplingMethod:
    """A solver, and what happens between its full evaluations.

    Args:
        name: For tables.
        solver: ``ddim``, ``dpmpp`` (DPM-Solver++ 2M) or ``unipc``.
        kind: What happens between full evaluations.
        early: Where those are; see ``schedule.spread_indices``. A plain run that is ``respaced`` has
            its times crowded in the same way.
    """

    name: str
    solver: str
    kind: Kind = "plain"
    early: float = 1.0


SAMPLING_METHODS = (
    SamplingMethod("DDIM", "ddim"),
    SamplingMethod("DPM-Solver++ 2M", "dpmpp"),
    SamplingMethod("Morse on DDIM", "ddim", "morse"),
    SamplingMethod("Morse on 2M", "dpmpp", "morse"),
    SamplingMethod("extrapolation on DDIM", "ddim", "extrapolate"),
    SamplingMethod("UniPC", "unipc"),
    SamplingMethod("DeepCache on DDIM", "ddim", "deepcache"),
    SamplingMethod("DDIM, early", "ddim", "respaced", EARLY),
    SamplingMethod("DPM-Solver++ 2M, early", "dpmpp", "respaced", EARLY),
    SamplingMethod("Morse on DDIM, early", "ddim", "morse", EARLY),
    SamplingMethod("Morse on 2M, early", "dpmpp", "morse", EARLY),
    SamplingMethod("extrapolation on DDIM, early", "ddim", "extrapolate", EARLY),
)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one method made with one budget.

    Attributes:
        images: [n, c, h, w] in [-1, 1].
        seconds: Measured, of the whole loop.
        lsd: Cost by counts times medians, in Dash steps.
        pattern: Steps: D for a full one, d for a Dot's, c for a cached one.
    """

    images: Tensor
    seconds: float
    lsd: float
    pattern: str


def build_solver(name: str, config: Any) -> Any:
    """Build a scheduler for one noise schedule; all have trailing times and a clean end.

    First-order DPM-Solver++ is DDIM, but reads its list of times, so that any step count works.

    Args:
        name: See ``SamplingMethod``.
        config: Settings of the noise schedule, or another scheduler's ``config``.
    """
    common: dict[str, Any] = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    if name == "unipc":
        return UniPCMultistepScheduler.from_config(config, **common)
    order = 1 if name == "ddim" else 2
    return DPMSolverMultistepScheduler.from_config(config, solver_order=order, **common)


def affordable_plan(
    method: SamplingMethod, budget: float, times: StepTimes, r: float | None = None
) -> MorsePlan | int:
    """Return the plan, or the plain step count, that a method can afford.

    Args:
        method: The method.
        budget: In LSD.
        times: Measured times of the networks.
        r: Steps per LSD of Morse; default ``make_plan``'s.
    """
    if method.kind == "morse":
        return make_plan(budget, times.speed_ratio, r, early=method.early)
    if method.kind == "extrapolate":
        dash = round(budget)
        return MorsePlan.spread(dash, round(FREE_EXPANSION * budget) - dash, early=method.early)
    if method.kind == "deepcache":
        assert times.cached is not None
        return affordable_deepcache_steps(budget, times.cached / times.dash)
    return round(budget)


def crowded_times(steps: int, early: float, train_steps: int) -> list[int]:
    """Return times of a plain run, crowded at the noisy start; ``early`` = 1 is trailing spacing."""
    return [round(train_steps * (1 - (j / steps) ** early)) - 1 for j in range(steps)]


def run_method(
    method: SamplingMethod,
    pipe: Any,
    dot: Dot | None,
    plan: MorsePlan | int,
    calls: Sequence[dict[str, Any]],
    times: StepTimes,
) -> Samples:
    """Sample with one method and time it.

    Args:
        method: The method.
        pipe: The pipeline; its scheduler is replaced by the method's.
        dot: Fills in the Dot steps of Morse.
        plan: From ``affordable_plan``.
        calls: The pipeline's keyword arguments, one mapping per batch.
        times: For the cost in LSD.
    """
    # The solver, and its times.
    pipe.scheduler = build_solver(method.solver, pipe.scheduler.config)
    steps = plan if isinstance(plan, int) else plan.n_total
    schedule: dict[str, Any] = {"num_inference_steps": steps}
    if method.kind == "respaced":
        train_steps = int(pipe.scheduler.config.num_train_timesteps)
        schedule = {"timesteps": crowded_times(steps, method.early, train_steps)}

    # Batch by batch; switching the method on and off is not part of its time.
    images, seconds = [], 0.0
    filler = dot if method.kind == "morse" else ExtrapolationDot()
    for inputs in calls:
        with _enabled(method, pipe, filler, plan):
            began = time.perf_counter()
            images.append(result_images(pipe(**schedule, **inputs)))
            seconds += time.perf_counter() - began
    return Samples(images=torch.cat(images), seconds=seconds, **_cost(method, plan, times))


@contextmanager
def _enabled(method: SamplingMethod, pipe: Any, dot: Any, plan: MorsePlan | int) -> Iterator[None]:
    """Run a block with what the method puts on the pipeline's network."""
    if method.kind == "deepcache":
        with deepcache_enabled(pipe):
            yield
    elif isinstance(plan, MorsePlan):
        with apply_morse(pipe, dot, plan):
            yield
    else:
        yield


def _cost(method: SamplingMethod, plan: MorsePlan | int, times: StepTimes) -> dict[str, Any]:
    """Return ``lsd`` and ``pattern`` of ``Samples``."""
    if isinstance(plan, MorsePlan):
        return {"lsd": plan.lsd, "pattern": plan.pattern}
    if method.kind == "deepcache":
        full = -(-plan // DEEPCACHE_INTERVAL)
        assert times.cached is not None
        lsd = full + (plan - full) * times.cached / times.dash
        pattern = "".join("c" if i % DEEPCACHE_INTERVAL else "D" for i in range(plan))
        return {"lsd": lsd, "pattern": pattern}
    return {"lsd": float(plan), "pattern": "D" * plan}
