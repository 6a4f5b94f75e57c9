"""The ``demo`` command: three real open_clip models on pairs of digits.

The members trained alone are cached; the chain and its parts are trained anew each time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from com_pt.config import DemoConfig
from com_pt.demo.analysis import cell_rows, draw_curve, paper_claims
from com_pt.demo.arms import Cell, CellPlan, Setup, read_or_train_cell
from com_pt.demo.data import DigitPairs
from com_pt.demo.models import MEMBERS
from effml_common.device import device_name, resolve_device
from effml_common.folders import cache_folder, cache_key, run_folder
from effml_common.logging import Progress, say
from effml_common.report import Report, ReportBuilder, Row

ARMS_SHOWN = ("scratch", "feature only", "embed", "embed + feature", "lossless + feature")
CHAIN_ARM = "lossless + feature"
STAGE_SHARES = {"S": 0.19, "B": 0.12}  # of the individual updates, as in the authors' scripts
BATCH, LEARNING_RATE = 64, 2e-3
METRIC = "zero-shot top-1"
LIBRARIES = ("open-clip-torch", "scikit-learn", "accelerate")


def demo(config: DemoConfig) -> Report:
    """Train, compare and write the report.

    Raises:
        NonFiniteError: If a training diverges.
    """
    # Prepare: one thread, so that a seed gives the same numbers on every machine.
    device = resolve_device(config.device)
    builder = ReportBuilder("com-pt", LIBRARIES)
    say("about 2 minutes a seed on two quiet CPU cores, the first time 3 more; models are cached")
    torch.set_num_threads(1)
    out = run_folder(config.out, "demo")
    setup = Setup(
        task=DigitPairs({}),
        task_name="com_pt.demo.data:DigitPairs",
        data={},
        members=MEMBERS,
        metric=METRIC,
        batch=BATCH,
    )

    # Train every member in every way, seed by seed.
    seeds = list(range(1, config.seeds + 1))
    cells: list[Cell] = []
    with Progress("demo", len(seeds) * (len(MEMBERS) + 2 * len(ARMS_SHOWN))) as bar:
        for seed in seeds:
            for cell in train_seed(setup, config.steps, seed, out, device):
                cells.append(cell)
                bar.advance(1, **{METRIC: cell.value})

    # Compare and write.
    return builder.write(
        out / "run",
        [*cell_rows(cells, METRIC), *family_row(cells)],
        figures=draw_curve(cells, "B", METRIC, out / "run" / "accuracy.png"),
        seeds=seeds,
        device=device,
        claims=paper_claims(cells, ["", *MEMBERS], CHAIN_ARM, 1, 0.005),
        notes=[
            "100-way zero-shot on pairs of unseen digits, chance 0.01; GMAC count all predecessors",
            "a seed varies initialisation and order; every run has a complete schedule of its own",
        ],
    )


def train_seed(
    setup: Setup, steps: int, seed: int, out: Path, device: torch.device
) -> Iterator[Cell]:
    """Train all cells of a seed, those that others start from first.

    Args:
        setup: What all cells share.
        steps: Updates of individual training.
        seed: The seed of initialisation and order.
        out: Out folder of the demo.
        device: Where to compute.
    """
    # Members alone come from the cache, if they were trained with the same settings before.
    settings = [steps, MEMBERS, BATCH, LEARNING_RATE, device_name(device)]
    key = cache_key(settings, ("com-pt", "torch", *LIBRARIES))
    cache = cache_folder("com-pt") / key
    alone = {member: _plan(f"{member} alone", member, "scratch", steps, seed) for member in MEMBERS}
    for plan in alone.values():
        yield read_or_train_cell(setup, plan, cache, None, device)

    # The chain goes on from the member of its arm; the other arms start there too.
    fresh = out / "run" / "cells"
    source = alone["T"].folder(cache)
    for member, share in STAGE_SHARES.items():
        stage_steps = max(10, round(share * steps))
        plans = {
            arm: _plan(f"{member} {arm}", member, arm, stage_steps, seed) for arm in ARMS_SHOWN
        }
        for plan in plans.values():
            yield read_or_train_cell(setup, plan, fresh, source, device)
        source = plans[CHAIN_ARM].folder(fresh)


def _plan(cell: str, member: str, arm: str, steps: int, seed: int) -> CellPlan:
    return CellPlan(cell=cell, member=member, arm=arm, steps=steps, seed=seed, lr=LEARNING_RATE)


def family_row(cells: Sequence[Cell]) -> list[Row]:
    """Return the cost of the chain T, S, B beside its members trained alone."""
    seeds = sorted({cell.seed for cell in cells})
    macs_of = {(cell.cell, cell.seed): cell.macs for cell in cells}
    stages = ["T alone", f"S {CHAIN_ARM}", f"B {CHAIN_ARM}"]
    chain = [sum(macs_of[name, seed] for name in stages) / 1e9 for seed in seeds]
    alone = [sum(macs_of[f"{member} alone", seed] for member in MEMBERS) / 1e9 for seed in seeds]
    ratio = [separate / together for separate, together in zip(alone, chain, strict=True)]
    return [Row("chain of T, S, B", CHAIN_ARM, {"total GMAC": chain, "family ratio": ratio})]
