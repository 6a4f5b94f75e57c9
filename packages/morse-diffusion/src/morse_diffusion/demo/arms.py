"""The arms of the demo: each sampling method at each budget, all from the same noise.

The methods themselves, with the baselines among them, are in ``adapters.sampling_methods``, because
``bench`` compares them too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effml_common.logging import RunLog
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.sampling_methods import (
    SAMPLING_METHODS,
    Samples,
    affordable_plan,
    run_method,
)
from morse_diffusion.adapters.timing import StepTimes
from morse_diffusion.commands._comparison import Table
from morse_diffusion.config import DemoConfig
from morse_diffusion.method.metrics import Reference, frechet_distance, sliced_wasserstein

SHOWN_METHODS = (
    "DDIM",
    "Morse on DDIM",
    "Morse on DDIM, early",
    "extrapolation on DDIM, early",
    "DPM-Solver++ 2M",
    "Morse on 2M, early",
)
ARMS = tuple(method for method in SAMPLING_METHODS if method.name in SHOWN_METHODS)
BATCH = 64  # images per call of the pipeline
FIRST_NOISE_SEED = 1000  # seeds of the noise stay apart from those of training
IMAGES_PER_GRID = 10


@dataclass(frozen=True, kw_only=True)
class ArmResults:
    """What the arms made.

    Attributes:
        table: Measured cells, by arm and budget, one per seed.
        grids: The first images, by arm and budget, of the first seed.
    """

    table: Table
    grids: dict[tuple[str, int], Tensor]


def sample_arms(
    config: DemoConfig,
    pipe: PixelPipeline,
    dot: MorseDot,
    times: StepTimes,
    reference: Reference,
    run: Path,
) -> ArmResults:
    """Sample with every arm at every budget and seed, and measure the images.

    Args:
        config: Budgets, seeds, number of images, steps per LSD of Morse.
        pipe: The Dash in its sampling loop.
        dot: Its Dot.
        times: Measured times of both.
        reference: Real images.
        run: Folder of ``metrics.jsonl``.
    """
    table: Table = {}
    grids: dict[tuple[str, int], Tensor] = {}
    cells = len(ARMS) * len(config.budgets) * config.seeds

    # Every arm of a budget and a seed starts from the same noise.
    with RunLog(run) as log, log.progress("sampling", cells) as bar:
        for budget in config.budgets:
            for seed in range(1, config.seeds + 1):
                noise = initial_noise(pipe, config.samples, seed)
                calls = [{"latents": part} for part in noise.split(BATCH)]
                for arm in ARMS:
                    plan = affordable_plan(arm, budget, times, config.expansion)
                    samples = run_method(arm, pipe, dot, plan, calls, times)
                    cell = measure_samples(samples, reference)
                    table.setdefault((arm.name, budget), []).append(cell)
                    grids.setdefault((arm.name, budget), samples.images[:IMAGES_PER_GRID])
                    log.log(seed, {"arm": arm.name, "budget": budget, **cell})
                    bar.advance()
    return ArmResults(table=table, grids=grids)


def initial_noise(pipe: PixelPipeline, n: int, seed: int) -> Tensor:
    """Return the noise that every arm of a seed starts from, [n, c, h, w]."""
    config: Any = pipe.unet.config
    generator = torch.Generator().manual_seed(FIRST_NOISE_SEED + seed)
    shape = (n, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=generator)


def measure_samples(samples: Samples, reference: Reference) -> dict[str, float | str]:
    """Return what is kept of one arm, budget and seed."""
    measured = reference.measure(samples.images)
    return {
        **measured,
        "lsd": samples.lsd,
        "seconds": samples.seconds,
        "pattern": samples.pattern,
    }


def real_image_floor(reference: Reference, n: int) -> dict[str, float]:
    """Return both distances between ``n`` real images and the others: no sampler gets below."""
    order = torch.randperm(len(reference.features), generator=torch.Generator().manual_seed(0))
    first, rest = reference.features[order[:n]], reference.features[order[n:]]
    return {"fd": frechet_distance(first, rest), "sw": sliced_wasserstein(first, rest)}
