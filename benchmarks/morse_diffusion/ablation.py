"""What the Dot's training owes to each of its settings, on the demo's digits.

One setting is changed at a time; every Dot gets the same number of updates, the same Dash and the same
development noise. A cell is one Dot: its files, what it leaves of the residual, and the Frechet distance
of its samples at equal cost, with the N measured for its shape. Finished cells are kept; ``--report``
only writes the results.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import Report, Row, environment
from morse_diffusion import MorseDot
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.adapters.sampling_methods import (
    SAMPLING_METHODS,
    affordable_plan,
    build_solver,
    run_method,
)
from morse_diffusion.adapters.timing import StepTimes, measure_times
from morse_diffusion.config import DemoDotConfig
from morse_diffusion.demo.data import load_images
from morse_diffusion.demo.models import (
    CHANNELS,
    demo_pair,
    save_atomically,
    schedule_settings,
    train_demo_dot,
)
from morse_diffusion.method.metrics import Reference

PROG = "python -m benchmarks.morse_diffusion.ablation"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "rolled-out pairs": {"rollout": 0.3},
    "gap 0.2": {"gap_max": 0.2},
    "gap 1": {"gap_max": 1.0},
    "plain loss": {"min_snr": False},
    "twice as wide": {"channels": (16, 32)},
    "rank 4": {"rank": 4},
    "three times as long": {"dot_steps": 3},  # a factor
}
SAMPLED = ("DDIM", "Morse on DDIM", "Morse on DDIM, early", "Morse on 2M, early")
BUDGETS, SEEDS = (5, 10), (101, 102, 103)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Train Dots that differ in one setting."""

    variants: tuple[str, ...] = field(default=tuple(VARIANTS), metadata={"help": "which, in order"})
    updates: int = field(default=600, metadata={"help": "of each Dot"})
    samples: int = field(default=96, metadata={"help": "images per arm, budget and seed"})
    expansion: float = field(default=1.5, metadata={"help": "r of the plans"})
    cells: str = field(
        default="runs/morse-diffusion-ablation", metadata={"help": "folder of the cells"}
    )
    out: str = field(
        default="benchmarks/morse_diffusion/results", metadata={"help": "folder of the results"}
    )
    report: bool = field(default=False, metadata={"help": "only write the report"})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown:
            raise InputError(f"there is no variant {unknown[0]}; use some of {', '.join(VARIANTS)}")


def main() -> int:
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    torch.set_num_threads(1)
    try:
        config = parse(AblationConfig, words, prog=PROG, examples=(PROG,))
        folder = Path(config.cells) / f"{config.updates}-updates"
        folder.mkdir(parents=True, exist_ok=True)
        for name in () if config.report else config.variants:
            measure_variant(name, config, folder)
        write_results(config, folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure_variant(name: str, config: AblationConfig, folder: Path) -> None:
    """Train one Dot and sample with it, unless that is done already."""
    path = folder / f"{name.replace(' ', '-')}.json"
    if path.exists():
        return

    # The Dot, kept from an earlier run or trained now.
    changed = dict(VARIANTS[name])
    steps = config.updates * changed.pop("dot_steps", 1)
    settings = replace(DemoDotConfig(), dot_steps=steps, **changed)
    dash, _ = demo_pair(DemoDotConfig())
    dot_folder = path.with_suffix("")
    if not dot_folder.is_dir():
        save_atomically(train_demo_dot(settings, dash), dot_folder)
    dot = MorseDot.from_pretrained(str(dot_folder), dash)

    # Its samples at each budget, from the same noise as those of the other Dots.
    pipe = PixelPipeline(dash, build_solver("ddim", schedule_settings("digits")))
    times = kept_times(settings, pipe, dot, folder)
    reference = Reference.of(load_images("digits")[0])
    distances: dict[str, list[float]] = {}
    for arm in (arm for arm in SAMPLING_METHODS if arm.name in SAMPLED):
        if name != "base" and arm.kind == "plain":  # the same for every Dot
            continue
        for budget in BUDGETS:
            plan = affordable_plan(arm, budget, times, config.expansion)
            for seed in SEEDS:
                generator = torch.Generator().manual_seed(seed)
                shape = (config.samples, CHANNELS["digits"], 32, 32)
                calls = [{"latents": x} for x in torch.randn(shape, generator=generator).split(64)]
                torch.manual_seed(seed)
                samples = run_method(arm, pipe, dot, plan, calls, times)
                key = f"{arm.name} at {budget} LSD"
                distances.setdefault(key, []).append(reference.measure(samples.images)["fd"])

    cell = {
        "variant": name, "updates": steps, "N": times.speed_ratio,
        "residual left": dot.trained["residual_left"], "fd": distances,
    }  # fmt: skip
    atomic_write(path, json.dumps(cell) + "\n")
    print(time.strftime("%H:%M:%S"), cell, flush=True)


def kept_times(
    settings: DemoDotConfig, pipe: PixelPipeline, dot: MorseDot, folder: Path
) -> StepTimes:
    """Measured once for each shape of the Dot: plans must not change with the machine's load."""
    shape = "-".join(map(str, (settings.m, *settings.channels, settings.rank)))
    path = folder / f"times-{shape}.txt"
    if not path.exists():
        times = measure_times(pipe, dot, batch=64, repeats=11)
        atomic_write(path, json.dumps(dataclasses.asdict(times)) + "\n")
    return StepTimes(**json.loads(path.read_text()))


def write_results(config: AblationConfig, folder: Path) -> None:
    """Rows in the variants' order, as ``ablation.json`` and on the terminal."""
    cells = {
        c["variant"]: c for c in map(json.loads, (p.read_text() for p in folder.glob("*.json")))
    }
    rows = [
        Row(
            name,
            f"{cells[name]['updates']} updates",
            {"residual left": [cells[name]["residual left"]], "N": [cells[name]["N"]]}
            | cells[name]["fd"],
        )
        for name in VARIANTS
        if name in cells
    ]
    report = Report(
        package="morse-diffusion",
        version=version("morse-diffusion"),
        command=[PROG],
        seeds=list(SEEDS),
        seconds=0.0,
        rows=rows,
        claims=[],
        notes=[
            f"Frechet distance of {config.samples} images; development seeds of the initial noise; "
            "one training of each Dot"
        ],
        environment=environment(("diffusers",)),
    )
    Path(config.out).mkdir(parents=True, exist_ok=True)
    document = json.dumps(report.to_json(), indent=1, allow_nan=False)
    atomic_write(Path(config.out) / "ablation.json", document + "\n")
    from rich.console import Console

    Console().print(report)


if __name__ == "__main__":
    sys.exit(main())
