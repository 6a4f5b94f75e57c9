"""The ``bench`` command: samplers at equal measured time on a user's own pipeline."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.folders import run_folder
from effml_common.logging import Progress, say, warn
from effml_common.report import Report, ReportBuilder
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.images import image_files, read_images
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.adapters.pixels import RGB, PixelPipeline, call_inputs, sample_sides
from morse_diffusion.adapters.sampling_methods import (
    SAMPLING_METHODS,
    SamplingMethod,
    affordable_plan,
    run_method,
)
from morse_diffusion.adapters.timing import StepTimes, measure_times
from morse_diffusion.commands._comparison import (
    Table,
    draw_curves,
    paired_claims,
    speed_up_notes,
    table_rows,
)
from morse_diffusion.config import BenchConfig
from morse_diffusion.method.metrics import Reference
from morse_diffusion.method.schedule import MorsePlan

LEAST_SPEED_RATIO = 1.5  # N below which no plan gains time
FIRST_NOISE_SEED = 1000  # seeds of the noise stay apart from those of training
TIMING_PLAN = MorsePlan(12, (0, 4, 8))  # a short run that both kinds of step are timed in
BASELINE_NAMES = {
    "ddim": "DDIM",
    "dpmpp": "DPM-Solver++ 2M",
    "unipc": "UniPC",
    "extrapolate": "extrapolation on DDIM",
    "deepcache": "DeepCache on DDIM",
}


@dataclass(frozen=True, kw_only=True)
class BenchInputs:
    """What the user gave, read and measured: pipeline, Dot, real images, times per step."""

    pipe: Any
    dot: MorseDot
    reference: Reference
    times: StepTimes
    device: torch.device


def bench(config: BenchConfig) -> Report:
    """Compare Morse with other samplers and write a report.

    Raises:
        InputError: If the inputs cannot be used, or the measured N is too small for any gain.
    """
    builder = ReportBuilder("morse-diffusion", ("diffusers",))
    run = run_folder(config.out, "bench") / "run"
    methods = chosen_methods(config)
    inputs = read_bench_inputs(config)
    table = measure_methods(config, methods, inputs)

    # The report, with its figure.
    return builder.write(
        run,
        table_rows(table),
        figures=draw_curves(table, run / "quality.png", None),
        claims=paired_claims(table),
        notes=[
            f"measured N = {inputs.times.speed_ratio:.2f} at batch {config.batch}",
            "seconds are end to end; for latent models they include the decoder",
            *speed_up_notes(table),
        ],
        seeds=list(range(config.seeds)),
        device=inputs.device,
    )


def read_bench_inputs(config: BenchConfig) -> BenchInputs:
    """Load pipeline, Dot and real images, and time the networks.

    Raises:
        InputError: If one of them cannot be used, or the measured N is too small for any gain.
    """
    device = resolve_device(config.device)
    pipe = load_pipeline(config.pipe, device)
    dot = MorseDot.from_pretrained(config.dot, denoiser_of(pipe))

    # A Dot that is hardly faster than the Dash is refused before the long part.
    times = measure_step_times(pipe, dot, config)
    say(f"N = {times.speed_ratio:.2f}; a Dash step takes {times.dash:.1f} ms")
    if times.speed_ratio < LEAST_SPEED_RATIO:
        raise InputError(
            f"measured N = {times.speed_ratio:.2f}: the Dot is too slow here for any speed-up; "
            "use a larger batch, compile, or a Dot with narrower channels"
        )
    reference = Reference.of(read_real_images(pipe, config.data))
    return BenchInputs(pipe=pipe, dot=dot, reference=reference, times=times, device=device)


def chosen_methods(config: BenchConfig) -> list[SamplingMethod]:
    """Return the baselines that the user asked for, and Morse on DDIM and on DPM-Solver++ 2M."""
    names = {BASELINE_NAMES[name] for name in config.baselines}
    names |= {"Morse on DDIM", "Morse on 2M"}
    chosen = [method for method in SAMPLING_METHODS if method.name in names]
    return [replace(m, early=config.early) if m.kind == "morse" else m for m in chosen]


def measure_step_times(pipe: Any, dot: MorseDot, config: BenchConfig) -> StepTimes:
    """Time the networks alone, or within a short run of a text pipeline."""
    with_deepcache = "deepcache" in config.baselines
    if isinstance(pipe, PixelPipeline):
        return measure_times(pipe, dot, config.batch, deepcache=with_deepcache)
    if with_deepcache:
        warn("DeepCache is compared on pixel pipelines only; it is left out")

    # The hook times every step of the run.
    fast = MorsePipeline.from_pipe(pipe, dot)
    fast(plan=TIMING_PLAN, **call_inputs(pipe, config.prompt, config.batch))
    summary = fast.summary()
    dash = summary.per_step("Dash")
    assert dash is not None
    return StepTimes(dash=dash, dot=summary.per_step("Dot"), cached=None)


def read_real_images(pipe: Any, folder: str) -> torch.Tensor:
    """Read reference images at the pipeline's own size, [n, c, h, w] in [-1, 1]."""
    denoiser: Any = denoiser_of(pipe)
    height, width = sample_sides(denoiser)
    in_pixels = isinstance(pipe, PixelPipeline)
    factor, channels = (
        (1, denoiser.config.in_channels) if in_pixels else (pipe.vae_scale_factor, RGB)
    )
    images, _ = read_images(image_files(folder), (height * factor, width * factor), channels)
    return images


def measure_methods(
    config: BenchConfig, methods: list[SamplingMethod], inputs: BenchInputs
) -> Table:
    """Sample with every method at every budget and seed; all start from the same noise."""
    if inputs.times.cached is None:
        methods = [method for method in methods if method.kind != "deepcache"]

    # Cell by cell; the times of a step are those that were measured before.
    table: Table = {}
    with Progress("sampling", len(methods) * len(config.budgets) * config.seeds) as bar:
        for budget in config.budgets:
            for method in methods:
                plan = affordable_plan(method, budget, inputs.times)
                for seed in range(config.seeds):
                    calls = batch_calls(config, inputs.pipe, seed)
                    samples = run_method(method, inputs.pipe, inputs.dot, plan, calls, inputs.times)
                    table.setdefault((method.name, budget), []).append(
                        {
                            **inputs.reference.measure(samples.images),
                            "lsd": samples.lsd,
                            "seconds": samples.seconds,
                            "pattern": samples.pattern,
                        }
                    )
                    bar.advance(method=method.name, budget=budget)
    return table


def batch_calls(config: BenchConfig, pipe: Any, seed: int) -> list[dict[str, Any]]:
    """Return the pipeline's keyword arguments for each batch of one cell."""
    generator = torch.Generator().manual_seed(FIRST_NOISE_SEED + seed)
    sizes = [min(config.batch, config.samples - i) for i in range(0, config.samples, config.batch)]
    return [{**call_inputs(pipe, config.prompt, n), "generator": generator} for n in sizes]
