"""What FIS is compared with: fewer steps, skipped blocks, and diffusers' caches, on the demo's Wan.

Every arm is a context that changes a transformer and undoes it. Costs are counted by torch over the
whole run, so that adaptive caches are charged for what they really computed. Distances are to the clips
that the dense model makes of the same noise; ``frechet`` is to real clips, so that it does not punish a
clip for being another one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fis_dit.config import PRESETS, FISConfig
from fis_dit.demo.data import CLIP_SETS, draw_clips, draw_noise, to_pixels
from fis_dit.demo.models import STUDENT_STEPS, denoise, load_model, noise_levels
from fis_dit.method.metrics import (
    coverage,
    flicker,
    frechet_distance,
    motion_error,
    psnr,
    relative_l2,
    slowest_quarter,
)

Results = dict[str, list[dict[str, float]]]  # per arm, one entry per seed
Change = Callable[[Any], contextlib.AbstractContextManager[Any]]
CACHES = ("FirstBlockCache 0.2", "FirstBlockCache 0.3", "MagCache 0.3", "PAB every 2")
CACHES += ("TaylorSeer order 1, every 2", "FasterCache")
REFERENCE_CLIPS = 1024  # real clips that generated ones are compared with
SHOWN_CLIPS = 6  # of the first seed, for the animation
MOST_COST_OF_A_PEER = 0.77  # of the dense FLOPs: "3 steps" of 4, and a little
LARGEST_PSNR = 99.0  # dB, for clips that are equal


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
class ArmRun:
    """What one arm made of some noise.

    Attributes:
        clips: "b 1 f h w", on the CPU.
        velocity: Of the first step, same shape.
        flops: Of the transformer over the run.
    """

    clips: Tensor
    velocity: Tensor
    flops: float


@torch.no_grad()
def run_arm(model: Any, arm: Arm, noise: Tensor, prompt: Tensor, *, batch: int = 16) -> ArmRun:
    """Make clips in one arm.

    Args:
        model: The demo's transformer, on any device; unchanged afterwards.
        arm: What changes the transformer, and at which noise levels it runs.
        noise: "b 1 f h w", on the CPU, so that every device starts from the same.
        prompt: "b 2 16", on the CPU.
        batch: Clips at a time; adaptive caches decide per batch.
    """
    clips, velocities, total_flops, device = [], [], 0.0, model.device
    for noise_part, prompt_part in zip(noise.split(batch), prompt.split(batch), strict=True):
        with arm.change(model), FlopCounterMode(display=False) as counter:
            noise_part, prompt_part = noise_part.to(device), prompt_part.to(device)
            steps = list(denoise(model, noise_part, prompt_part, arm.levels))
            model._reset_stateful_cache()
        velocities.append(steps[0][0])
        clips.append(steps[-1][1])
        total_flops += counter.get_total_flops()
    return ArmRun(torch.cat(clips).cpu(), torch.cat(velocities).cpu(), total_flops)


class Judge:
    """Real clips of a data set, and the metrics that need them.

    Args:
        data: "shapes" or "digits".
    """

    def __init__(self, data: str) -> None:
        self.scale = CLIP_SETS[data].std
        self.features: Any = load_model(data, "classifier").features
        self.real = draw_clips(data, REFERENCE_CLIPS, seed=99)[0]
        self.reference = self.features(self.real).flatten(0, 1)

    def __call__(self, run: ArmRun, dense: ArmRun) -> dict[str, float]:
        """Measure one arm on one seed; PSNR is in pixel units with peak 1."""
        slow = slowest_quarter(dense.clips)
        features = self.features(run.clips).flatten(0, 1)
        return {
            "cost": run.flops / dense.flops,
            "psnr": self._psnr(run.clips, dense.clips),
            "relative l2": relative_l2(run.clips, dense.clips),
            "velocity error": relative_l2(run.velocity, dense.velocity),
            "motion error": motion_error(run.clips, dense.clips),
            "worst / best frame": coverage(run.clips, dense.clips) if run is not dense else 1.0,
            "psnr slow": self._psnr(run.clips[slow], dense.clips[slow]),
            "frechet": frechet_distance(features, self.reference),
            "flicker": flicker(run.clips, self.real),
        }

    def _psnr(self, clips: Tensor, dense: Tensor) -> float:
        return min(LARGEST_PSNR, psnr(clips * self.scale, dense * self.scale, 1.0))


@dataclass(frozen=True)
class Comparison:
    """What all arms made of the same noise.

    Attributes:
        arms: In the order of the report; dense comes first.
        results: Metrics of every arm, one entry per seed.
        shown: Clips of every arm for the animation, "n f h w" in [0, 1].
    """

    arms: Sequence[Arm]
    results: Results = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)

    def best_peer(self) -> str:
        """Return the arm nearest to real clips among others that cost at most "3 steps" of 4."""
        ours = ("dense", "FIS", "interleaved", "static")
        peers = [arm.name for arm in self.arms if arm.group not in ours]
        cheap = [p for p in peers if average(self.results[p], "cost") <= MOST_COST_OF_A_PEER]
        return min(cheap, key=lambda name: average(self.results[name], "frechet"))

    def paired_gaps(self, better: str, worse: str, metric: str, sign: int) -> list[float]:
        """Return paired gaps over seeds; with ``sign`` -1, lower is better."""
        pairs = zip(self.results[better], self.results[worse], strict=True)
        return [sign * (first[metric] - second[metric]) for first, second in pairs]


def compare(
    data: str,
    model: Any,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    clips: int,
    on_result: Callable[[int, str, dict[str, float]], None],
) -> Comparison:
    """Run every arm on the same noise, and judge its clips.

    Args:
        data: "shapes" or "digits".
        model: The demo's transformer.
        arms: Dense comes first.
        seeds: Of noise and labels.
        clips: Per seed.
        on_result: Called after every arm with the seed, the arm's name and its metrics.
    """
    comparison, judge = Comparison(arms), Judge(data)
    for seed in seeds:
        noise, prompt = draw_noise(data, clips, seed)
        dense = run_arm(model, arms[0], noise, prompt)
        for arm in arms:
            run = dense if arm.group == "dense" else run_arm(model, arm, noise, prompt)
            metrics = judge(run, dense)
            comparison.results.setdefault(arm.name, []).append(metrics)
            shown = to_pixels(data, run.clips[:SHOWN_CLIPS, 0])
            comparison.shown.setdefault(arm.name, shown)
            on_result(seed, arm.name, metrics)
    return comparison


def average(runs: Sequence[Mapping[str, float]], metric: str) -> float:
    """Average a metric over seeds."""
    return sum(run[metric] for run in runs) / len(runs)


def make_arms(ratios: Sequence[float]) -> list[Arm]:
    """Make the demo's arms; the study in ``benchmarks`` has more.

    Args:
        ratios: Of ``measure_magnitude_ratios``, for MagCache.
    """
    caches = [arm for arm in make_cache_arms(ratios) if arm.name in CACHES]
    return [
        Arm("dense", "dense"),
        *(make_fis_arm(f"FIS {name}", **settings) for name, settings in PRESETS.items()),
        make_fis_arm("FIS static anchors", "static", pattern="static", equalize=True),
        make_fis_arm("FIS interleaved, same count", "interleaved", equalize=True),
        Arm("3 steps", "fewer steps", levels=noise_levels(3)),
        Arm("2 steps", "fewer steps", levels=noise_levels(2)),
        make_dropped_step_arm(3),
        make_skipped_blocks_arm([6, 7]),
        make_skipped_blocks_arm([2, 6, 7]),
        *caches,
    ]


def make_fis_arm(name: str, group: str = "FIS", **settings: Any) -> Arm:
    """Make an arm of frame-interleaved sparsity with the settings of a ``FISConfig``."""
    config = FISConfig(num_inference_steps=STUDENT_STEPS, **settings)
    return Arm(name, group, lambda model: apply_fis(model, config))


def make_dropped_step_arm(position: int) -> Arm:
    """Make an arm of the student's levels without one, so that the step before it is longer."""
    levels = noise_levels(STUDENT_STEPS)
    remaining = [*levels[:position], *levels[position + 1 :]]
    return Arm(f"without level {position + 1} of 4", "fewer steps", levels=remaining)


def make_skipped_blocks_arm(skipped: Sequence[int]) -> Arm:
    """Make an arm that leaves whole blocks out."""

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        blocks = list(model.blocks)
        model.blocks = nn.ModuleList([b for i, b in enumerate(blocks) if i not in skipped])
        try:
            yield
        finally:
            model.blocks = nn.ModuleList(blocks)

    return Arm(f"skip blocks {' '.join(map(str, skipped))}", "block skipping", change)


def measure_magnitude_ratios(model: Any, noise: Tensor, prompt: Tensor) -> list[float]:
    """Calibrate MagCache: how the blocks' residual grows from one step to the next.

    Args:
        model: The demo's transformer.
        noise: "b 1 f h w".
        prompt: "b 2 16".

    Returns:
        One ratio for each step; that of the first is 1.
    """
    # The residual of all blocks together, at every step.
    residuals: list[Tensor] = []
    inputs: list[Tensor] = []
    first = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    last = model.blocks[-1].register_forward_hook(
        lambda _, __, output: residuals.append(output - inputs.pop())
    )
    noise, prompt = noise.to(model.device), prompt.to(model.device)
    with torch.no_grad():
        for _ in denoise(model, noise, prompt, noise_levels(STUDENT_STEPS)):
            pass
    first.remove()
    last.remove()

    # Its norm relative to that of the step before.
    norms = [residual.norm(dim=-1) for residual in residuals]
    pairs = zip(norms[1:], norms, strict=False)
    return [1.0, *(float((now / before).mean()) for now, before in pairs)]


def make_cache_arms(ratios: Sequence[float]) -> list[Arm]:
    """Make arms of diffusers' caches over their useful settings at four steps.

    Args:
        ratios: Of ``measure_magnitude_ratios``, for MagCache.
    """
    return [
        *(_make_first_block_cache_arm(threshold) for threshold in (0.1, 0.2, 0.3, 0.5, 0.8)),
        *(_make_mag_cache_arm(threshold, ratios) for threshold in (0.1, 0.3, 0.6, 1.0)),
        *(_make_taylor_seer_arm(order, interval) for order, interval in ((0, 2), (1, 2), (1, 3))),
        *(_make_pyramid_attention_arm(skip) for skip in (2, 4)),
        _make_faster_cache_arm(),
    ]


def _make_cache_arm(name: str, group: str, make_config: Callable[[Callable[[], int]], Any]) -> Arm:
    """Make an arm of one of diffusers' caches.

    ``make_config`` builds the cache's config anew for every run, from a function that tells the time
    step.
    """

    @contextlib.contextmanager
    def change(model: Any) -> Iterator[None]:
        time_step = [1000]
        hook = model.register_forward_pre_hook(
            lambda _, args: time_step.__setitem__(0, int(args[1].flatten()[0]))
        )
        model.enable_cache(make_config(lambda: time_step[0]))
        try:
            yield
        finally:
            model.disable_cache()
            hook.remove()

    return Arm(name, group, change)


def _make_first_block_cache_arm(threshold: float) -> Arm:
    return _make_cache_arm(
        f"FirstBlockCache {threshold:g}",
        "FirstBlockCache",
        lambda _: FirstBlockCacheConfig(threshold=threshold),
    )


def _make_mag_cache_arm(threshold: float, ratios: Sequence[float]) -> Arm:
    return _make_cache_arm(
        f"MagCache {threshold:g}",
        "MagCache",
        lambda _: MagCacheConfig(
            threshold=threshold,
            max_skip_steps=2,
            retention_ratio=0.25,
            num_inference_steps=STUDENT_STEPS,
            mag_ratios=list(ratios),
        ),
    )


def _make_taylor_seer_arm(order: int, interval: int) -> Arm:
    return _make_cache_arm(
        f"TaylorSeer order {order}, every {interval}",
        "TaylorSeer",
        # The default patterns match no attention of Wan: without identifiers nothing is cached.
        lambda _: TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=2 if order else 1,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn\d", r"blocks\.\d+\.ffn"],
        ),
    )


def _make_pyramid_attention_arm(skip: int) -> Arm:
    return _make_cache_arm(
        f"PAB every {skip}",
        "PAB",
        lambda time_step: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            cross_attention_block_skip_range=skip,
            spatial_attention_timestep_skip_range=(-1, 1001),
            cross_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=time_step,
        ),
    )


def _make_faster_cache_arm() -> Arm:
    return _make_cache_arm(
        "FasterCache",
        "FasterCache",
        lambda time_step: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 999),  # the first step fills its cache
            current_timestep_callback=time_step,
            is_guidance_distilled=True,
        ),
    )
