"""Morse against what users would pick instead, at equal measured time.

Arms: DDIM, DPM-Solver++ 2M, UniPC, DeepCache, a free extrapolation Dot, Morse on DDIM and on 2M. A cell
is one arm at one budget and one seed; finished cells are kept, so a run that was stopped goes on where
it was. ``--report`` only writes the report of the cells there are.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import Report, Row, environment, write_report
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.sampling_methods import (
    SAMPLING_METHODS,
    SamplingMethod,
    affordable_plan,
    build_solver,
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
from morse_diffusion.config import DemoDotConfig
from morse_diffusion.demo.data import load_images
from morse_diffusion.demo.models import CHANNELS, demo_pair, schedule_settings
from morse_diffusion.method.metrics import Reference, frechet_distance, sliced_wasserstein

PROG = "python -m benchmarks.morse_diffusion.study"
EXAMPLES = (PROG, f"{PROG} --data shapes --dot-steps 4500 --budgets 5 10")
LONGEST_FOR_ALL = 20  # LSD; above it only ``long_arms`` run


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare samplers at equal measured time on the demo's denoisers."""

    data: Literal["digits", "shapes"] = field(default="digits", metadata={"help": "images"})
    budgets: tuple[int, ...] = field(default=(10, 5, 20, 50), metadata={"help": "LSD, in order"})
    seeds: int = field(default=3, metadata={"help": "seeds of the initial noise"})
    first_seed: int = field(default=1, metadata={"help": "0 is for development"})
    samples: int = field(default=256, metadata={"help": "images per cell"})
    arms: tuple[str, ...] = field(default=(), metadata={"help": "names; default all"})
    long_arms: tuple[str, ...] = field(
        default=("DDIM", "DPM-Solver++ 2M", "Morse on DDIM", "Morse on 2M"),
        metadata={"help": "arms that run at budgets above 20"},
    )
    expansion: float | None = field(default=None, metadata={"help": "r; default the plan's own"})
    dot_steps: int | None = field(
        default=None, metadata={"help": "updates of the Dot's training; default the demo's"}
    )
    cells: str = field(default="runs/morse-diffusion", metadata={"help": "folder of the cells"})
    out: str = field(
        default="benchmarks/morse_diffusion/results", metadata={"help": "folder of the results"}
    )
    report: bool = field(default=False, metadata={"help": "only write the report"})


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(StudyConfig, words, prog=PROG, examples=EXAMPLES)
    folder = Path(config.cells) / study_name(config)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images, _ = load_images(config.data)
    reference = Reference.of(images)
    if not config.report:
        measure_cells(config, folder, reference)
    write_results(config, folder, reference)


def study_name(config: StudyConfig) -> str:
    """The study's name, for folders and files."""
    return config.data if config.dot_steps is None else f"{config.data}-{config.dot_steps}"


def measure_cells(config: StudyConfig, folder: Path, reference: Reference) -> None:
    """Sample every cell that is not there yet."""
    # The networks, and times that stay the same for the whole study.
    pair = DemoDotConfig(data=config.data)
    if config.dot_steps is not None:
        pair = dataclasses.replace(pair, dot_steps=config.dot_steps)
    dash, dot = demo_pair(pair)
    pipe = PixelPipeline(dash, build_solver("ddim", schedule_settings(config.data)))
    times = kept_times(pipe, dot, folder)
    print(f"N {times.speed_ratio:.2f}", times, flush=True)

    channels = CHANNELS[config.data]
    for seed, budget, arm in cell_order(config):
        path = folder / f"{arm.name.replace(' ', '_')}-{budget}-{seed}.json"
        if path.exists():
            continue

        # The same noise for every arm of a seed.
        plan = affordable_plan(arm, budget, times, config.expansion)
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = torch.randn((config.samples, channels, 32, 32), generator=generator)
        torch.manual_seed(seed)
        calls = [{"latents": part} for part in noise.split(64)]
        samples = run_method(arm, pipe, dot, plan, calls, times)
        cell = {
            "arm": arm.name, "budget": budget, "seed": seed, "samples": config.samples,
            "lsd": samples.lsd, "seconds": samples.seconds, "pattern": samples.pattern,
            **reference.measure(samples.images),
        }  # fmt: skip
        atomic_write(path, json.dumps(cell) + "\n")
        print({k: v for k, v in cell.items() if k != "pattern"}, flush=True)


def cell_order(config: StudyConfig) -> list[tuple[int, int, SamplingMethod]]:
    """Budget by budget, so that a run cut short has complete columns."""
    arms = [arm for arm in SAMPLING_METHODS if not config.arms or arm.name in config.arms]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [
        (seed, budget, arm)
        for budget in config.budgets
        for seed in seeds
        for arm in arms
        if budget <= LONGEST_FOR_ALL or arm.name in config.long_arms
    ]


def kept_times(pipe: PixelPipeline, dot: Any, folder: Path) -> StepTimes:
    """Measured once and kept: plans must not change within a study."""
    path = folder / "times.json"
    if not path.exists():
        times = measure_times(pipe, dot, batch=64, repeats=11, deepcache=True)
        atomic_write(path, json.dumps(dataclasses.asdict(times)) + "\n")
    return StepTimes(**json.loads(path.read_text()))


def complete_table(config: StudyConfig, cells: list[dict[str, Any]]) -> Table:
    """Cells by arm and budget, in the order of their seeds, where all seeds are there."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    table: Table = {}
    for cell in sorted(cells, key=lambda c: c["seed"]):
        if cell["seed"] in seeds:
            table.setdefault((cell["arm"], cell["budget"]), []).append(cell)
    return {key: runs for key, runs in table.items() if len(runs) == config.seeds}


def real_image_floor(config: StudyConfig, reference: Reference) -> dict[str, float]:
    """Both distances between two disjoint parts of the real images."""
    half = len(reference.features) // 2
    generator = torch.Generator().manual_seed(0)
    shuffled = reference.features[torch.randperm(2 * half, generator=generator)]
    first, second = shuffled[: config.samples], shuffled[half:]
    return {"fd": frechet_distance(first, second), "sw": sliced_wasserstein(first, second)}


def write_results(config: StudyConfig, folder: Path, reference: Reference) -> None:
    """Write report and figure of the cells there are."""
    # What was measured.
    cells = [json.loads(p.read_text()) for p in sorted(folder.glob("*-*-*.json"))]
    times = StepTimes(**json.loads((folder / "times.json").read_text()))
    table = complete_table(config, cells)
    floor = real_image_floor(config, reference)
    real = {name: [value] for name, value in floor.items()}
    rows = [Row(f"{config.samples} real images", "against other real images: the floor", real)]
    report = Report(
        package="morse-diffusion", version=version("morse-diffusion"), command=sys.argv,
        seeds=list(range(config.first_seed, config.first_seed + config.seeds)),
        seconds=sum(cell["seconds"] for cell in cells),
        rows=[*rows, *table_rows(table)], claims=paired_claims(table),
        notes=[*study_notes(config, times), *speed_up_notes(table)],
        environment=environment(("diffusers", "deepcache")),
    )  # fmt: skip

    # Into the folder of the results, and onto the terminal.
    out, name = Path(config.out), study_name(config)
    figures = draw_curves(table, out / f"{name}.png", floor)
    run_dir = folder / "report"
    run_dir.mkdir(exist_ok=True)
    write_report(report, run_dir, figures=figures)
    atomic_write(out / f"{name}.json", (run_dir / "report.json").read_text())
    for note in report.notes:
        print(note)
    for claim in report.to_json()["claims"]:
        print(claim["holds"], claim["text"], claim["value"], claim["stderr"])
    print(f"{time.strftime('%H:%M:%S')} {len(cells)} cells")


def study_notes(config: StudyConfig, times: StepTimes) -> list[str]:
    """What a reader of the table must know."""
    cached = "" if times.cached is None else f", a DeepCache step {times.cached / times.dash:.2f}"
    return [
        f"{config.samples} images a cell; a seed varies the initial noise, shared by all arms",
        f"measured medians at batch 64: N = {times.speed_ratio:.2f}{cached} of a Dash step",
        "lsd is counts times these medians; seconds are measured, on a machine that others used too",
        "DPM-Solver++ lowers its order at the end of runs below 15 steps, so Morse's longer run of "
        "the same budget does not",
    ]


if __name__ == "__main__":
    main()
