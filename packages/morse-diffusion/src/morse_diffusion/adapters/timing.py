"""How long a step of each network takes on the device at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from morse_diffusion.adapters.deepcache import deepcache_enabled
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.run_summary import clock

MIDDLE_TIME = 500.0  # time step at which the networks are timed; their cost does not depend on it
EVERY_SECOND = 2  # DeepCache interval at which a full and a cached step come in turns


@dataclass(frozen=True, kw_only=True)
class StepTimes:
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
        """N: how many Dot steps take the time of a Dash step."""
        assert self.dot is not None
        return self.dash / self.dot


@torch.no_grad()
def measure_times(
    pipe: PixelPipeline, dot: MorseDot | None, batch: int, repeats: int = 7, deepcache: bool = False
) -> StepTimes:
    """Time the networks alone, one after the other in turns, so that noise hits all alike.

    Args:
        pipe: Its UNet is the Dash.
        dot: Folded here; None to time the Dash alone.
        batch: Samples per call.
        repeats: Turns that count; one more warms up.
        deepcache: Time a step of DeepCache as well.
    """
    # What is timed: the same random batch for all.
    config: Any = pipe.unet.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    x = x.to(next(pipe.unet.parameters()))
    t = torch.full((batch,), MIDDLE_TIME, device=x.device)
    calls: dict[str, Callable[[], Any]] = {"dash": lambda: pipe.unet(x, t)}
    if dot is not None:
        dot.to(x.device, x.dtype).fold_()
        calls["dot"] = lambda: dot(x, x, x, t, t)

    # In turns; the first turn warms up.
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = clock(x.device)
            call()
            times[name].append(1e3 * (clock(x.device) - began))
    cached_share = _deepcache_share(pipe, x, repeats) if deepcache else None

    # Medians, of ratios within a turn where there are two.
    dash = median(times["dash"][1:])
    ratios = zip(times.get("dot", [])[1:], times["dash"][1:], strict=False)
    dot_time = dash * median(dot / full for dot, full in ratios) if dot is not None else None
    cached = None if cached_share is None else dash * cached_share
    return StepTimes(dash=dash, dot=dot_time, cached=cached)


def _deepcache_share(pipe: PixelPipeline, x: Tensor, repeats: int) -> float:
    """Return the time of a DeepCache step, as a share of the full step before it."""
    pipe.scheduler.set_timesteps(EVERY_SECOND * repeats)
    full, cached = [], []
    with deepcache_enabled(pipe, EVERY_SECOND):
        for i, t in enumerate(pipe.scheduler.timesteps):
            began = clock(x.device)
            pipe.unet(x, t)
            (cached if i % EVERY_SECOND else full).append(1e3 * (clock(x.device) - began))
    return median(c / f for c, f in zip(cached[1:], full[1:], strict=True))
