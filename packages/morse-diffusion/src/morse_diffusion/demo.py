"""The ``demo`` command: the same denoiser, several samplers, equal measured time.

The digits Dash and its Dot come with the package; other settings are trained once and cached.
"""

import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from effml_common.device import device_name, resolve_device
from effml_common.logging import RunLog, say
from effml_common.report import Report, Row, environment, write_report
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.comparison import ARMS, Ran, measure_times, plan_for, run_arm, solver
from morse_diffusion.config import DemoConfig, DemoDotConfig
from morse_diffusion.demo_data import images_of
from morse_diffusion.demo_model import demo_pair, schedule_of
from morse_diffusion.evaluation import Reference, frechet_distance, sliced_wasserstein
from morse_diffusion.tables import Table, claims_of, curves, rows_of, speed_up_notes

SHOWN = (
    "DDIM",
    "Morse on DDIM",
    "Morse on DDIM, early",
    "extrapolation on DDIM, early",
    "DPM-Solver++ 2M",
    "Morse on 2M, early",
)
BATCH = 64


def demo(config: DemoConfig) -> Report:
    """Compare the samplers and write the report.

    Raises:
        NonFiniteError: If a training that is not cached diverges.
    """
    started = time.monotonic()
    device = resolve_device(config.device)
    say(
        "about 2.5 minutes a seed on two quiet CPU cores; other settings than the default train first"
    )
    # Layers as small as the Dot's gain nothing from a second thread, and beside any other busy process
    # threads wait for one another: N was 2 instead of 4.
    torch.set_num_threads(1)
    own = {name: getattr(config, name) for name in DemoDotConfig.__dataclass_fields__}
    dash, dot = demo_pair(DemoDotConfig(**own), device)
    pipe = PixelPipeline(dash, solver("ddim", schedule_of(config.data)))
    times = measure_times(pipe, dot, BATCH)
    say(f"N = {times.speed_ratio:.2f}: a Dot step takes 1/{times.speed_ratio:.2f} of a Dash step")
    images, _ = images_of(config.data)
    reference = Reference.of(images)
    arms = [arm for arm in ARMS if arm.name in SHOWN]
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    table: Table = {}
    grids: dict[tuple[str, int], Tensor] = {}
    cells = len(arms) * len(config.budgets) * config.seeds
    with RunLog(out / "run") as log, log.progress("sampling", cells) as bar:
        for budget in config.budgets:
            for seed in range(1, config.seeds + 1):
                generator = torch.Generator().manual_seed(1000 + seed)
                noise = torch.randn((config.samples, *images.shape[1:]), generator=generator)
                for arm in arms:
                    plan = plan_for(arm, budget, times, config.expansion)
                    calls = [{"latents": part} for part in noise.split(BATCH)]
                    ran = run_arm(arm, pipe, dot, plan, calls, times)
                    cell = cell_of(ran, reference)
                    table.setdefault((arm.name, budget), []).append(cell)
                    grids.setdefault((arm.name, budget), ran.images[:10])
                    log.log(seed, {"arm": arm.name, "budget": budget, **cell})
                    bar.advance()
    floor = floor_of(reference, config.samples)
    figures = curves(table, out / "run" / "quality.png", floor)
    figures += sample_grid(grids, config.budgets[0], out / "run" / "samples.png")
    report = Report(
        package="morse-diffusion",
        version=version("morse-diffusion"),
        command=sys.argv,
        seeds=list(range(1, config.seeds + 1)),
        seconds=time.monotonic() - started,
        rows=[
            Row(f"{config.samples} real images", "the floor", {k: [v] for k, v in floor.items()}),
            *rows_of(table),
        ],
        claims=claims_of(table),
        notes=[
            f"measured N = {times.speed_ratio:.2f}; a seed varies the initial noise",
            "fd: Frechet distance in 20 principal components; sw: sliced Wasserstein; lower is better",
            *speed_up_notes(table),
        ],
        files=[path.name for path in figures],
        environment=environment(("diffusers",), device_name(device)),
    )
    write_report(report, out / "run", figures=figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def cell_of(ran: Ran, reference: Reference) -> dict[str, float | str]:
    """What is kept of one arm, budget and seed."""
    measured = reference.measure(ran.images)
    return {**measured, "lsd": ran.lsd, "seconds": ran.seconds, "pattern": ran.pattern}


def floor_of(reference: Reference, n: int) -> dict[str, float]:
    """Both distances between ``n`` real images and the others."""
    order = torch.randperm(len(reference.features), generator=torch.Generator().manual_seed(0))
    first, rest = reference.features[order[:n]], reference.features[order[n:]]
    return {"fd": frechet_distance(first, rest), "sw": sliced_wasserstein(first, rest)}


def sample_grid(grids: dict[tuple[str, int], Tensor], budget: int, path: Path) -> list[Path]:
    """Draw ten samples of every arm at one budget, from the same noise."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    names = [name for name, b in grids if b == budget]
    figure = Figure(figsize=(10, 1.15 * len(names)), layout="constrained")
    for panel, name in zip(figure.subplots(len(names), 1), names, strict=True):
        strip = torch.cat(list(grids[name, budget]), dim=2).permute(1, 2, 0)
        panel.imshow(((strip + 1) / 2).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        panel.set_axis_off()
        panel.set_title(f"{name}, {budget} LSD", fontsize=9, loc="left")
    figure.savefig(path, dpi=120)
    return [path]
