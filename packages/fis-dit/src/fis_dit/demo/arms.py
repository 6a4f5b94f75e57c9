"""What FIS is compared with: fewer steps, skipped blocks, and diffusers' caches, on the demo's Wan.

Every rival is a context that changes a transformer and undoes it. Costs are counted by torch over the
whole run, so that adaptive caches are charged for what they really computed.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fis_dit.adapters.apply import apply_fis
from fis_dit.config import FISConfig
from fis_dit.demo.models import STUDENT_STEPS, euler, noise_levels

Change = Callable[[Any], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Arm:
    """One way to make the demo's clips.

    Attributes:
        name: Unique.
        group: Family of settings that were tuned together.
        change: Context around the run.
        levels: Noise levels of the sampler, from 1 to 0.
    """

    name: str
    group: str
    change: Change = contextlib.nullcontext
    levels: Sequence[float] = field(default_factory=lambda: noise_levels(STUDENT_STEPS))


@dataclass(frozen=True)
class Run:
    """Clips "b 1 f h w" and the first step's velocity, on the CPU; FLOPs of the transformer."""

    clips: Tensor
    velocity: Tensor
    flops: float


@torch.no_grad()
def run_arm(model: Any, arm: Arm, noise: Tensor, prompt: Tensor, *, batch: int = 16) -> Run:
    """Make clips in one arm.

    Args:
        model: The demo's transformer, on any device; unchanged afterwards.
        arm: As above.
        noise: "b 1 f h w", on the CPU, so that every device starts from the same.
        prompt: "b 2 16", on the CPU.
        batch: Clips at a time; adaptive caches decide per batch.
    """
    clips, velocities, total, device = [], [], 0.0, model.device
    for part, words in zip(noise.split(batch), prompt.split(batch), strict=True):
        with arm.change(model), FlopCounterMode(display=False) as counter:
            steps = list(euler(model, part.to(device), words.to(device), arm.levels))
            model._reset_stateful_cache()
        velocities.append(steps[0][0])
        clips.append(steps[-1][1])
        total += counter.get_total_flops()
    return Run(torch.cat(clips).cpu(), torch.cat(velocities).cpu(), total)


def fis(name: str, group: str = "FIS", **settings: Any) -> Arm:
    """Frame-interleaved sparsity with the settings of a ``FISConfig``."""
    config = FISConfig(num_inference_steps=STUDENT_STEPS, **settings)
    return Arm(name, group, lambda model: apply_fis(model, config))


def dropped_step(position: int) -> Arm:
    """The student's levels without one, so that the step before it is longer."""
    levels = noise_levels(STUDENT_STEPS)
    kept = [*levels[:position], *levels[position + 1 :]]
    return Arm(f"without level {position + 1} of 4", "fewer steps", levels=kept)


def skipped_blocks(blocks: Sequence[int]) -> Arm:
    """Leave whole blocks out."""

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        kept = list(model.blocks)
        model.blocks = nn.ModuleList([b for i, b in enumerate(kept) if i not in blocks])
        try:
            yield
        finally:
            model.blocks = nn.ModuleList(kept)

    return Arm(f"skip blocks {' '.join(map(str, blocks))}", "block skipping", change)


def cached(name: str, group: str, make: Callable[[Callable[[], int]], Any]) -> Arm:
    """One of diffusers' caches; ``make`` builds its config anew, given a function of the time."""

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        now = [1000]
        watch = model.register_forward_pre_hook(
            lambda _, args: now.__setitem__(0, int(args[1].flatten()[0]))
        )
        model.enable_cache(make(lambda: now[0]))
        try:
            yield
        finally:
            model.disable_cache()
            watch.remove()

    return Arm(name, group, change)


def magnitude_ratios(model: Any, noise: Tensor, prompt: Tensor) -> list[float]:
    """MagCache's calibration: how the blocks' residual grows from one step to the next."""
    residuals: list[Tensor] = []
    entered: list[Tensor] = []
    first = model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    last = model.blocks[-1].register_forward_hook(
        lambda _, __, out: residuals.append(out - entered.pop())
    )
    noise, prompt = noise.to(model.device), prompt.to(model.device)
    with torch.no_grad():
        for _ in euler(model, noise, prompt, noise_levels(STUDENT_STEPS)):
            pass
    first.remove()
    last.remove()
    norms = [residual.norm(dim=-1) for residual in residuals]
    pairs = zip(norms[1:], norms, strict=False)
    return [1.0, *(float((now / before).mean()) for now, before in pairs)]


def cache_arms(ratios: Sequence[float]) -> list[Arm]:
    """Diffusers' caches over their useful settings at four steps."""
    arms = [
        cached(
            f"FirstBlockCache {threshold:g}",
            "FirstBlockCache",
            lambda _, threshold=threshold: FirstBlockCacheConfig(threshold=threshold),
        )
        for threshold in (0.1, 0.2, 0.3, 0.5, 0.8)
    ]
    arms += [
        cached(
            f"MagCache {threshold:g}",
            "MagCache",
            lambda _, threshold=threshold: MagCacheConfig(
                threshold=threshold,
                max_skip_steps=2,
                retention_ratio=0.25,
                num_inference_steps=STUDENT_STEPS,
                mag_ratios=list(ratios),
            ),
        )
        for threshold in (0.1, 0.3, 0.6, 1.0)
    ]
    arms += [
        cached(
            f"TaylorSeer order {order}, every {interval}",
            "TaylorSeer",
            # The default patterns match no attention of Wan: without identifiers nothing is cached.
            lambda _, order=order, interval=interval: TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=2 if order else 1,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r"blocks\.\d+\.attn\d", r"blocks\.\d+\.ffn"],
            ),
        )
        for order, interval in ((0, 2), (1, 2), (1, 3))
    ]
    arms += [
        cached(
            f"PAB every {skip}",
            "PAB",
            lambda now, skip=skip: PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                cross_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=(-1, 1001),
                cross_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=now,
            ),
        )
        for skip in (2, 4)
    ]
    arms.append(
        cached(
            "FasterCache",
            "FasterCache",
            lambda now: FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 999),  # the first step fills its cache
                current_timestep_callback=now,
                is_guidance_distilled=True,
            ),
        )
    )
    return arms
