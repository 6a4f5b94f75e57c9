"""The ``bench`` command: samplers at equal measured time on a user's own pipeline."""

import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from effml_common.device import device_name, resolve_device
from effml_common.errors import InputError
from effml_common.logging import progress, say, warn
from effml_common.report import Report, environment, write_report
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.images import image_files, read_images
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.adapters.pixels import PixelPipeline, call_inputs
from morse_diffusion.comparison import ARMS, Arm, Times, measure_times, plan_for, run_arm
from morse_diffusion.config import BenchConfig
from morse_diffusion.evaluation import Reference
from morse_diffusion.plan import MorsePlan
from morse_diffusion.tables import Table, claims_of, curves, rows_of, speed_up_notes

WORTHWHILE_N = 1.5
NAMES = {
    "ddim": "DDIM",
    "dpmpp": "DPM-Solver++ 2M",
    "unipc": "UniPC",
    "extrapolate": "extrapolation on DDIM",
    "deepcache": "DeepCache on DDIM",
}


def bench(config: BenchConfig) -> Report:
    """Compare and write a report.

    Raises:
        InputError: If the inputs cannot be used, or the measured N is too small for any gain.
    """
    started = time.monotonic()
    device = resolve_device(config.device)
    pipe = load_pipeline(config.pipe, device)
    denoiser = denoiser_of(pipe)
    dot = MorseDot.from_pretrained(config.dot, denoiser)
    inputs = call_inputs(pipe, config.prompt, config.batch)
    times = times_of(pipe, dot, config, inputs)
    say(f"N = {times.speed_ratio:.2f}; a Dash step takes {times.dash:.1f} ms")
    if times.speed_ratio < WORTHWHILE_N:
        raise InputError(
            f"measured N = {times.speed_ratio:.2f}: the Dot is too slow here for any speed-up; "
            "use a larger batch, compile, or a Dot with narrower channels"
        )
    reference = Reference.of(real_images(pipe, config.data))
    table = measure(config, arms_of(config), pipe, dot, reference, times)
    out = Path(config.out or time.strftime("runs/bench-%Y%m%d-%H%M%S"))
    (out / "run").mkdir(parents=True, exist_ok=True)
    figures = curves(table, out / "run" / "quality.png", None)
    report = Report(
        package="morse-diffusion",
        version=version("morse-diffusion"),
        command=sys.argv,
        seeds=list(range(config.seeds)),
        seconds=time.monotonic() - started,
        rows=rows_of(table),
        claims=claims_of(table),
        notes=[
            f"measured N = {times.speed_ratio:.2f} at batch {config.batch}",
            "seconds are end to end; for latent models they include the decoder",
            *speed_up_notes(table),
        ],
        files=[path.name for path in figures],
        environment=environment(("diffusers",), device_name(device)),
    )
    write_report(report, out / "run", figures=figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def arms_of(config: BenchConfig) -> list[Arm]:
    """The baselines asked for, and Morse on the same solvers."""
    wanted = [NAMES[name] for name in config.baselines]
    morse = [f"Morse on {'DDIM' if name == 'ddim' else '2M'}" for name in ("ddim", "dpmpp")]
    chosen = [arm for arm in ARMS if arm.name in (*wanted, *morse)]
    return [replace(a, early=config.early) if a.method == "morse" else a for a in chosen]


def times_of(pipe: Any, dot: MorseDot, config: BenchConfig, inputs: dict[str, Any]) -> Times:
    """Measured times: of the networks alone, or within a short run of a text pipeline."""
    cached = "deepcache" in config.baselines
    if isinstance(pipe, PixelPipeline):
        return measure_times(pipe, dot, config.batch, deepcache=cached)
    if cached:
        warn("DeepCache is compared on pixel pipelines only; it is left out")
    fast = MorsePipeline.from_pipe(pipe, dot)
    fast(plan=MorsePlan(12, (0, 4, 8)), **inputs)
    summary = fast.summary()
    dash, dots = summary.per_step("Dash"), summary.per_step("Dot")
    assert dash is not None
    return Times(dash=dash, dot=dots, cached=None)


def real_images(pipe: Any, folder: str) -> torch.Tensor:
    """Reference images at the pipeline's own size."""
    config: Any = denoiser_of(pipe).config
    pixels = isinstance(pipe, PixelPipeline)
    side = config.sample_size * (1 if pixels else pipe.vae_scale_factor)
    images, _ = read_images(image_files(folder), (side, side), config.in_channels if pixels else 3)
    return images


def measure(
    config: BenchConfig,
    arms: list[Arm],
    pipe: Any,
    dot: MorseDot,
    reference: Reference,
    times: Times,
) -> Table:
    """Every arm at every budget and seed; all arms start from the same noise."""
    table: Table = {}
    if times.cached is None:
        arms = [arm for arm in arms if arm.method != "deepcache"]
    with progress("sampling", len(arms) * len(config.budgets) * config.seeds) as bar:
        for budget in config.budgets:
            for arm in arms:
                plan = plan_for(arm, budget, times)
                for seed in range(config.seeds):
                    ran = run_arm(arm, pipe, dot, plan, calls(config, pipe, seed), times)
                    table.setdefault((arm.name, budget), []).append(
                        {
                            **reference.measure(ran.images),
                            "lsd": ran.lsd,
                            "seconds": ran.seconds,
                            "pattern": ran.pattern,
                        }
                    )
                    bar.advance(arm=arm.name, budget=budget)
    return table


def calls(config: BenchConfig, pipe: Any, seed: int) -> list[dict[str, Any]]:
    """The batches of one cell."""
    generator = torch.Generator().manual_seed(1000 + seed)
    sizes = [min(config.batch, config.samples - i) for i in range(0, config.samples, config.batch)]
    return [{**call_inputs(pipe, config.prompt, n), "generator": generator} for n in sizes]
