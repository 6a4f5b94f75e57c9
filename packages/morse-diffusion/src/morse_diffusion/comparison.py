"""Samplers at equal measured time: what the demo, ``bench`` and the benchmark compare."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.hook import apply_morse
from morse_diffusion.adapters.pixels import PixelPipeline, as_images
from morse_diffusion.adapters.summary import clock
from morse_diffusion.plan import MorsePlan, make_plan
from morse_diffusion.sampler import Dot, ExtrapolationDot

Method = Literal["plain", "respaced", "morse", "extrapolate", "deepcache"]


@dataclass(frozen=True)
class Arm:
    """A way to sample.

    Args:
        name: For tables.
        solver: ``ddim``, ``dpmpp`` (DPM-Solver++ 2M) or ``unipc``.
        method: What happens between full evaluations.
        early: Where those are; see ``plan.spread_indices``. A plain run that is ``respaced`` has its
            times crowded in the same way.
    """

    name: str
    solver: str
    method: Method = "plain"
    early: float = 1.0


EARLY = 1.5
ARMS = (
    Arm("DDIM", "ddim"),
    Arm("DPM-Solver++ 2M", "dpmpp"),
    Arm("Morse on DDIM", "ddim", "morse"),
    Arm("Morse on 2M", "dpmpp", "morse"),
    Arm("extrapolation on DDIM", "ddim", "extrapolate"),
    Arm("UniPC", "unipc"),
    Arm("DeepCache on DDIM", "ddim", "deepcache"),
    Arm("DDIM, early", "ddim", "respaced", EARLY),
    Arm("DPM-Solver++ 2M, early", "dpmpp", "respaced", EARLY),
    Arm("Morse on DDIM, early", "ddim", "morse", EARLY),
    Arm("Morse on 2M, early", "dpmpp", "morse", EARLY),
    Arm("extrapolation on DDIM, early", "ddim", "extrapolate", EARLY),
)
DEEPCACHE_INTERVAL = 3
FREE_EXPANSION = 2.5  # steps per Dash step of the extrapolation, which costs nothing


def solver(name: str, config: Any) -> Any:
    """A scheduler for one noise schedule, all with trailing times and a clean end.

    First-order DPM-Solver++ is DDIM, but reads its list of times, so that any step count works.
    """
    common: dict[str, Any] = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    if name == "unipc":
        return UniPCMultistepScheduler.from_config(config, **common)
    order = 1 if name == "ddim" else 2
    return DPMSolverMultistepScheduler.from_config(config, solver_order=order, **common)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Measured milliseconds per step at one batch size, from calls made in turns.

    ``dash`` is a median. The others are ``dash`` times the median of their ratio to it within a turn:
    whatever else the machine does then hits both alike.

    Attributes:
        dash: One evaluation of the Dash.
        dot: Of the Dot; None without one.
        cached: Of a Dash whose deep features DeepCache repeats; None where it is not used.
    """

    dash: float
    dot: float | None
    cached: float | None

    @property
    def speed_ratio(self) -> float:
        """N."""
        assert self.dot is not None
        return self.dash / self.dot


@torch.no_grad()
def measure_times(
    pipe: PixelPipeline, dot: MorseDot | None, batch: int, repeats: int = 7, deepcache: bool = False
) -> Times:
    """Time the networks alone, one after the other in turns, so that noise hits all alike."""
    config: Any = pipe.unet.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    x = x.to(next(pipe.unet.parameters()))
    t = torch.full((batch,), 500.0, device=x.device)
    calls: dict[str, Callable[[], Any]] = {"dash": lambda: pipe.unet(x, t)}
    if dot is not None:
        dot.to(x.device, x.dtype).fold_()
        calls["dot"] = lambda: dot(x, x, x, t, t)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = clock(x.device)
            call()
            times[name].append(1e3 * (clock(x.device) - began))
    cached = None
    if deepcache:
        cached = _cached_time(pipe, x, repeats)
    dash = median(times["dash"][1:])
    ratios = zip(times.get("dot", [])[1:], times["dash"][1:], strict=False)
    dot_time = dash * median(dot / full for dot, full in ratios) if dot is not None else None
    return Times(dash=dash, dot=dot_time, cached=None if cached is None else dash * cached)


def _cached_time(pipe: PixelPipeline, x: Tensor, repeats: int) -> float:
    """Time of a DeepCache step, as a part of the full step before it."""
    pipe.scheduler.set_timesteps(2 * repeats)
    full, cached = [], []
    with deepcached(pipe, 2):
        for i, t in enumerate(pipe.scheduler.timesteps):
            began = clock(x.device)
            pipe.unet(x, t)
            (cached if i % 2 else full).append(1e3 * (clock(x.device) - began))
    return median(some / whole for some, whole in zip(cached[1:], full[1:], strict=True))


@contextmanager
def deepcached(pipe: Any, interval: int) -> Iterator[None]:
    """Run a block with the DeepCache package on the pipeline's UNet."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Samples of one arm at one budget.

    Attributes:
        images: [n, c, h, w] in [-1, 1].
        seconds: Measured, of the whole loop.
        lsd: Cost by counts times medians, in Dash steps.
        pattern: Steps.
    """

    images: Tensor
    seconds: float
    lsd: float
    pattern: str


def plan_for(arm: Arm, budget: float, times: Times, r: float | None = None) -> MorsePlan | int:
    """The plan, or the plain step count, that an arm can afford."""
    if arm.method == "morse":
        return make_plan(budget, times.speed_ratio, r, early=arm.early)
    if arm.method == "extrapolate":
        dash = round(budget)
        return MorsePlan.spread(dash, round(FREE_EXPANSION * budget) - dash, early=arm.early)
    if arm.method == "deepcache":
        assert times.cached is not None
        cached = times.cached / times.dash
        spent, steps = 0.0, 0
        while True:
            cost = cached if steps % DEEPCACHE_INTERVAL else 1.0
            if spent + cost > budget + 1e-9:
                return steps
            spent, steps = spent + cost, steps + 1
    return round(budget)


def respaced(steps: int, early: float, train_steps: int) -> list[int]:
    """Times of a plain run, crowded at the noisy start; ``early`` = 1 is trailing spacing."""
    return [round(train_steps * (1 - (j / steps) ** early)) - 1 for j in range(steps)]


def run_arm(
    arm: Arm,
    pipe: Any,
    dot: Dot | None,
    plan: MorsePlan | int,
    calls: Sequence[dict[str, Any]],
    times: Times,
) -> Ran:
    """Sample and time it; each of ``calls`` is the pipeline's keyword arguments for one batch."""
    pipe.scheduler = solver(arm.solver, pipe.scheduler.config)
    steps = plan if isinstance(plan, int) else plan.n_total
    images, seconds = [], 0.0
    chosen = dot if arm.method == "morse" else ExtrapolationDot()
    schedule: dict[str, Any] = {"num_inference_steps": steps}
    if arm.method == "respaced":
        train = int(pipe.scheduler.config.num_train_timesteps)
        schedule = {"timesteps": respaced(steps, arm.early, train)}
    for inputs in calls:
        with _method(arm, pipe, chosen, plan):
            began = time.perf_counter()
            images.append(as_images(pipe(**schedule, **inputs)))
            seconds += time.perf_counter() - began
    return Ran(images=torch.cat(images), seconds=seconds, **_cost(arm, plan, times))


@contextmanager
def _method(arm: Arm, pipe: Any, dot: Any, plan: MorsePlan | int) -> Iterator[None]:
    if arm.method == "deepcache":
        with deepcached(pipe, DEEPCACHE_INTERVAL):
            yield
    elif isinstance(plan, MorsePlan):
        with apply_morse(pipe, dot, plan):
            yield
    else:
        yield


def _cost(arm: Arm, plan: MorsePlan | int, times: Times) -> dict[str, Any]:
    if isinstance(plan, MorsePlan):
        return {"lsd": plan.lsd, "pattern": plan.pattern}
    if arm.method == "deepcache":
        full = -(-plan // DEEPCACHE_INTERVAL)
        assert times.cached is not None
        lsd = full + (plan - full) * times.cached / times.dash
        pattern = "".join("c" if i % DEEPCACHE_INTERVAL else "D" for i in range(plan))
        return {"lsd": lsd, "pattern": pattern}
    return {"lsd": float(plan), "pattern": "D" * plan}
