"""The ``demo`` command: the same denoiser, several samplers, equal measured time.

The digits Dash and its Dot come with the package; other settings are trained once and cached.
"""

from dataclasses import fields

import torch

from effml_common.device import resolve_device
from effml_common.folders import run_folder
from effml_common.logging import say
from effml_common.report import Report, ReportBuilder, Row
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.sampling_methods import build_solver
from morse_diffusion.adapters.timing import StepTimes, measure_times
from morse_diffusion.commands._comparison import (
    draw_curves,
    paired_claims,
    speed_up_notes,
    table_rows,
)
from morse_diffusion.config import DemoConfig, DemoDotConfig
from morse_diffusion.demo.arms import BATCH, ArmResults, real_image_floor, sample_arms
from morse_diffusion.demo.data import load_images
from morse_diffusion.demo.models import demo_pair, schedule_settings
from morse_diffusion.demo.plots import draw_sample_grid
from morse_diffusion.method.metrics import Reference


def demo(config: DemoConfig) -> Report:
    """Compare the samplers and write the report.

    Raises:
        NonFiniteError: If a training that is not cached diverges.
    """
    builder = ReportBuilder("morse-diffusion", ("diffusers",))
    device = resolve_device(config.device)
    say(
        "about 2.5 minutes a seed on two quiet CPU cores; other settings than the default train first"
    )
    # Layers as small as the Dot's gain nothing from a second thread, and beside any other busy process
    # threads wait for one another: N was 2 instead of 4.
    torch.set_num_threads(1)

    # The networks and their times.
    run = run_folder(config.out, "demo") / "run"
    pair_settings = {f.name: getattr(config, f.name) for f in fields(DemoDotConfig)}
    dash, dot = demo_pair(DemoDotConfig(**pair_settings), device)
    pipe = PixelPipeline(dash, build_solver("ddim", schedule_settings(config.data)))
    times = measure_times(pipe, dot, BATCH)
    say(f"N = {times.speed_ratio:.2f}: a Dot step takes 1/{times.speed_ratio:.2f} of a Dash step")

    # Samples of every arm, beside real images.
    images, _ = load_images(config.data)
    reference = Reference.of(images)
    results = sample_arms(config, pipe, dot, times, reference, run)
    floor = real_image_floor(reference, config.samples)

    figures = draw_curves(results.table, run / "quality.png", floor)
    figures += draw_sample_grid(results.grids, config.budgets[0], run / "samples.png")
    return builder.write(
        run,
        demo_rows(config, results, floor),
        figures=figures,
        claims=paired_claims(results.table),
        notes=demo_notes(results, times),
        seeds=list(range(1, config.seeds + 1)),
        device=device,
    )


def demo_rows(config: DemoConfig, results: ArmResults, floor: dict[str, float]) -> list[Row]:
    """Return the floor and every arm."""
    real = {name: [value] for name, value in floor.items()}
    return [
        Row(f"{config.samples} real images", "the floor", real),
        *table_rows(results.table),
    ]


def demo_notes(results: ArmResults, times: StepTimes) -> list[str]:
    """Return what a reader of the table must know."""
    return [
        f"measured N = {times.speed_ratio:.2f}; a seed varies the initial noise",
        "fd: Frechet distance in 20 principal components; sw: sliced Wasserstein; lower is better",
        *speed_up_notes(results.table),
    ]
