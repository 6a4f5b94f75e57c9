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

from effml_common.cli import COMMON_FLAGS, parse
from effml_common.files import atomic_write
from effml_common.report import Report, Row, environment, write_report
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.comparison import ARMS, Arm, Times, measure_times, plan_for, run_arm, solver
from morse_diffusion.config import DemoDotConfig
from morse_diffusion.demo_data import images_of
from morse_diffusion.demo_model import CHANNELS, demo_pair, schedule_of
from morse_diffusion.evaluation import Reference, frechet_distance, sliced_wasserstein
from morse_diffusion.tables import Table, claims_of, curves, rows_of, speed_up_notes

PROG = "python benchmarks/morse_diffusion_study.py"
EXAMPLES = (PROG, f"{PROG} --data shapes --dot-steps 4500 --budgets 5 10")


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
    out: str = field(default="benchmarks/results", metadata={"help": "folder of the results"})
    report: bool = field(default=False, metadata={"help": "only write the report"})


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(StudyConfig, words, prog=PROG, examples=EXAMPLES)
    folder = Path(config.cells) / name_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images, _ = images_of(config.data)
    reference = Reference.of(images)
    if not config.report:
        measure_all(config, folder, reference)
    write(config, folder, reference)


def name_of(config: StudyConfig) -> str:
    """The study's name, for folders and files."""
    return config.data if config.dot_steps is None else f"{config.data}-{config.dot_steps}"


def measure_all(config: StudyConfig, folder: Path, reference: Reference) -> None:
    pair = DemoDotConfig(data=config.data)
    if config.dot_steps is not None:
        pair = dataclasses.replace(pair, dot_steps=config.dot_steps)
    dash, dot = demo_pair(pair)
    pipe = PixelPipeline(dash, solver("ddim", schedule_of(config.data)))
    times = times_of(pipe, dot, folder)
    print(f"N {times.speed_ratio:.2f}", times, flush=True)
    channels = CHANNELS[config.data]
    for seed, budget, arm in order(config):
        path = folder / f"{arm.name.replace(' ', '_')}-{budget}-{seed}.json"
        if path.exists():
            continue
        plan = plan_for(arm, budget, times, config.expansion)
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = torch.randn((config.samples, channels, 32, 32), generator=generator)
        torch.manual_seed(seed)
        calls = [{"latents": part} for part in noise.split(64)]
        ran = run_arm(arm, pipe, dot, plan, calls, times)
        cell = {
            "arm": arm.name, "budget": budget, "seed": seed, "samples": config.samples,
            "lsd": ran.lsd, "seconds": ran.seconds, "pattern": ran.pattern,
            **reference.measure(ran.images),
        }  # fmt: skip
        atomic_write(path, json.dumps(cell) + "\n")
        print({k: v for k, v in cell.items() if k != "pattern"}, flush=True)


def order(config: StudyConfig) -> list[tuple[int, int, Arm]]:
    """Budget by budget, so that a run cut short has whole columns."""
    arms = [arm for arm in ARMS if not config.arms or arm.name in config.arms]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [
        (seed, budget, arm)
        for budget in config.budgets
        for seed in seeds
        for arm in arms
        if budget <= 20 or arm.name in config.long_arms
    ]


def times_of(pipe: PixelPipeline, dot: Any, folder: Path) -> Times:
    """Measured once and kept: plans must not change within a study."""
    path = folder / "times.json"
    if not path.exists():
        times = measure_times(pipe, dot, batch=64, repeats=11, deepcache=True)
        atomic_write(path, json.dumps(dataclasses.asdict(times)) + "\n")
    return Times(**json.loads(path.read_text()))


def write(config: StudyConfig, folder: Path, reference: Reference) -> None:
    cells = [json.loads(p.read_text()) for p in sorted(folder.glob("*-*-*.json"))]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    times = Times(**json.loads((folder / "times.json").read_text()))
    table: Table = {}
    for cell in sorted(cells, key=lambda c: c["seed"]):
        if cell["seed"] in seeds:
            table.setdefault((cell["arm"], cell["budget"]), []).append(cell)
    table = {key: runs for key, runs in table.items() if len(runs) == config.seeds}
    half = len(reference.features) // 2
    shuffled = reference.features[
        torch.randperm(2 * half, generator=torch.Generator().manual_seed(0))
    ]
    first, second = shuffled[: config.samples], shuffled[half:]
    floor = {"fd": [frechet_distance(first, second)], "sw": [sliced_wasserstein(first, second)]}
    rows = [Row(f"{config.samples} real images", "against other real images: the floor", floor)]
    report = Report(
        package="morse-diffusion", version=version("morse-diffusion"), command=sys.argv,
        seeds=list(seeds), seconds=sum(cell["seconds"] for cell in cells),
        rows=[*rows, *rows_of(table)],
        claims=claims_of(table), notes=[*notes(config, times), *speed_up_notes(table)],
        environment=environment(("diffusers", "deepcache")),
    )  # fmt: skip
    out = Path(config.out)
    means = {name: values[0] for name, values in floor.items()}
    figures = curves(table, out / f"morse-diffusion-{name_of(config)}.png", means)
    run_dir = folder / "report"
    run_dir.mkdir(exist_ok=True)
    write_report(report, run_dir, figures=figures)
    name = f"morse-diffusion-{name_of(config)}.json"
    atomic_write(out / name, (run_dir / "report.json").read_text())
    for note in report.notes:
        print(note)
    for claim in report.to_json()["claims"]:
        print(claim["holds"], claim["text"], claim["value"], claim["stderr"])
    print(f"{time.strftime('%H:%M:%S')} {len(cells)} cells")


def notes(config: StudyConfig, times: Times) -> list[str]:
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
