"""The ``demo`` command: three real open_clip models on pairs of digits.

The members trained alone are cached; the chain and its parts are trained anew each time.
"""

import hashlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from com_pt.config import DemoConfig
from com_pt.study import Cell, claims_of, curve, rows_of, train_cell
from com_pt.tasks.digits import DigitPairs, pair_model
from effml_common.device import device_name, resolve_device
from effml_common.logging import progress, say
from effml_common.report import Report, Row, environment, write_report

MEMBERS = {"T": pair_model(64, 64), "S": pair_model(128, 64), "B": pair_model(128, 64, 4)}
SHOWN = ("scratch", "feature only", "embed", "embed + feature", "lossless + feature")
CHAIN = "lossless + feature"
SHARES = {"S": 0.19, "B": 0.12}  # of the individual updates, as in the authors' scripts
BATCH, RATE = 64, 2e-3
METRIC = "zero-shot top-1"
LIBRARIES = ("open-clip-torch", "scikit-learn", "accelerate")


def demo(config: DemoConfig) -> Report:
    """Train, compare and write the report.

    Raises:
        NonFiniteError: If a training diverges.
    """
    device = resolve_device(config.device)
    started = time.monotonic()
    say("about 2 minutes a seed on two quiet CPU cores, the first time 3 more; models are cached")
    torch.set_num_threads(1)
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    task = DigitPairs({})
    cells: list[Cell] = []
    with progress("demo", config.seeds * (len(MEMBERS) + 2 * len(SHOWN))) as bar:
        for seed in range(1, config.seeds + 1):
            for cell in _seed(config, task, out, seed, device):
                cells.append(cell)
                bar.advance(1, **{METRIC: cell.value})
    names = ["", *MEMBERS]
    figures = curve(cells, "B", METRIC, out / "run" / "accuracy.png")
    report = Report(
        package="com-pt",
        version=version("com-pt"),
        command=sys.argv,
        seeds=list(range(1, config.seeds + 1)),
        seconds=time.monotonic() - started,
        rows=[*rows_of(cells, METRIC), *family_row(cells)],
        claims=claims_of(cells, names, CHAIN, 1, 0.005),
        notes=[
            "100-way zero-shot on pairs of unseen digits, chance 0.01; GMAC count all predecessors",
            "a seed varies initialisation and order; every run has a complete schedule of its own",
        ],
        files=[path.name for path in figures],
        environment=environment(LIBRARIES, device_name(device)),
    )
    write_report(report, out / "run", figures=figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def _seed(
    config: DemoConfig, task: DigitPairs, out: Path, seed: int, device: torch.device
) -> list[Cell]:
    alone = cache_folder(config.steps, device)
    fresh = out / "run" / "cells"
    cells = []
    for member in MEMBERS:
        name, steps = f"{member} alone", config.steps
        cells.append(_cell(task, alone, None, name, member, "scratch", steps, seed, device))
    before = alone / f"T_alone-{seed}"
    for member, share in SHARES.items():
        for arm in SHOWN:
            steps = max(10, round(share * config.steps))
            name = f"{member} {arm}"
            cells.append(_cell(task, fresh, before, name, member, arm, steps, seed, device))
        before = fresh / f"{member} {CHAIN}-{seed}".replace(" ", "_")
    return cells


def _cell(
    task: DigitPairs,
    folder: Path,
    source: Path | None,
    name: str,
    member: str,
    arm: str,
    steps: int,
    seed: int,
    device: torch.device,
) -> Cell:
    place = folder / f"{name}-{seed}".replace(" ", "_")
    done = place / "cell.json"
    if done.exists():
        return Cell(**json.loads(done.read_text(encoding="utf-8")))
    place.mkdir(parents=True, exist_ok=True)
    return train_cell(
        task,
        "com_pt.tasks.digits:DigitPairs",
        {},
        MEMBERS,
        place,
        source,
        name=name,
        member=member,
        arm=arm,
        steps=steps,
        seed=seed,
        metric=METRIC,
        batch=BATCH,
        lr=RATE,
        device=device,
    )


def cache_folder(steps: int, device: torch.device) -> Path:
    """Where members trained alone are kept: a name for every setting, device and library version."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = [version(name) for name in ("com-pt", "torch", *LIBRARIES)]
    settings = [steps, MEMBERS, BATCH, RATE, versions, device_name(device)]
    key = json.dumps(settings, sort_keys=True)
    return root / "effml" / "com-pt" / hashlib.sha256(key.encode()).hexdigest()[:16]


def family_row(cells: list[Cell]) -> list[Row]:
    """Cost of the chain T, S, B beside its members trained alone."""
    seeds = sorted({cell.seed for cell in cells})
    of = {(cell.cell, cell.seed): cell for cell in cells}
    chain = [f"S {CHAIN}", f"B {CHAIN}"]
    macs = [sum(of[name, seed].macs for name in ("T alone", *chain)) / 1e9 for seed in seeds]
    alone = [sum(of[f"{member} alone", seed].macs for member in MEMBERS) / 1e9 for seed in seeds]
    ratio = [a / m for a, m in zip(alone, macs, strict=True)]
    return [Row("chain of T, S, B", CHAIN, {"total GMAC": macs, "family ratio": ratio})]
