"""Arms, tables, claims and curves of a comparison of ways to train a family."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from com_pt.chain import ChainConfig, StageConfig
from com_pt.growth import Mode
from com_pt.run import plan_chain, run_chain
from com_pt.tasks.base import Task
from effml_common.files import atomic_write
from effml_common.report import Claim, Row

WEIGHT = 1.953  # lambda of the released alpha = 500 at 512 channels
ARMS: dict[str, tuple[Mode, float]] = {
    "scratch": ("random", 0.0),
    "feature only": ("random", WEIGHT),
    "official": ("official", 0.0),
    "embed": ("embed", 0.0),
    "lossless": ("lossless", 0.0),
    "official + feature": ("official", WEIGHT),
    "embed + feature": ("embed", WEIGHT),
    "lossless + feature": ("lossless", WEIGHT),
}


@dataclass(frozen=True)
class Cell:
    """One member, trained in one way with one seed.

    Attributes:
        cell: Its name: member, and arm or place in a chain.
        value: Held-out metric at the end; ``start`` right after growth.
        macs: Of this training; ``total_macs`` of it and all it was grown from.
        forward: MACs of a sample's forward pass.
    """

    cell: str
    member: str
    arm: str
    seed: int
    steps: int
    value: float
    start: float | None
    macs: float
    total_macs: float
    seconds: float
    forward: int


def train_cell(
    task: Task,
    task_name: str,
    data: Mapping[str, Any],
    members: Mapping[str, Any],
    place: Path,
    source: Path | None,
    *,
    name: str,
    member: str,
    arm: str,
    steps: int,
    seed: int,
    metric: str,
    batch: int,
    lr: float,
    device: torch.device | None = None,
) -> Cell:
    """Train one member in one way into ``place``, from the cell in ``source`` if there is one."""
    mode, weight = ARMS[arm]
    common: dict[str, Any] = {"batch_size": batch, "lr": lr, "warmup_steps": 50}
    stages = []
    spent = 0.0
    if source is not None:
        small = json.loads((source / "cell.json").read_text(encoding="utf-8"))
        init = str(source / "run" / small["member"])
        first = StageConfig(
            name=small["member"], model=members[small["member"]], init_from=init, **common
        )
        stages.append(first)
        spent = small["total_macs"] if arm != "scratch" else 0.0
    epochs = steps / (len(task) // batch)
    stages.append(
        StageConfig(
            name=member,
            model=members[member],
            epochs=epochs,
            growth=mode,
            feature_weight=weight,
            **common,
        )
    )
    chain = ChainConfig(
        task=task_name, data=data, stages=tuple(stages), seed=seed, individual_epochs=epochs
    )
    run = place / "run"
    done = run_chain(chain, run, task=task, resume=True, force=True, device=device)[-1]
    cell = Cell(
        cell=name,
        member=member,
        arm=arm,
        seed=seed,
        steps=done.steps,
        value=done.metrics[metric],
        start=done.start.get(metric),
        macs=done.macs,
        total_macs=spent + done.macs,
        seconds=done.seconds,
        forward=plan_chain(chain, task).stages[-1].forward,
    )
    atomic_write(place / "cell.json", json.dumps(asdict(cell)) + "\n")
    return cell


def by_seed(cells: Sequence[Cell], name: str) -> dict[int, Cell]:
    """The cells of a name, by seed."""
    return {cell.seed: cell for cell in sorted(cells, key=lambda c: c.seed) if cell.cell == name}


def rows_of(cells: Sequence[Cell], metric: str) -> list[Row]:
    """A row per cell name, with values over seeds."""
    rows = []
    for name in dict.fromkeys(
        cell.cell for cell in sorted(cells, key=lambda c: (c.forward, c.cell))
    ):
        group = list(by_seed(cells, name).values())
        metrics = {
            metric: [c.value for c in group],
            "total GMAC": [c.total_macs / 1e9 for c in group],
            "own GMAC": [c.macs / 1e9 for c in group],
            "seconds": [c.seconds for c in group],
        }
        starts = [c.start for c in group if c.start is not None]
        if starts:
            metrics["at the start"] = starts
        rows.append(Row(name, f"{group[0].steps} updates", metrics))
    return rows


def family_cost(
    cells: Sequence[Cell], names: Sequence[str], start: str, length: int
) -> dict[int, list[Cell]]:
    """By seed, the cells of a chain of ``length`` members that ends in the largest."""
    smallest, first, second, third = names
    chains = {
        1: [f"{third} alone"],
        2: [f"{second} alone", f"{third} of 2"],
        3: [f"{first} alone", f"{second} {start}", f"{third} {start}"],
        4: [f"{smallest} alone", *(f"{member} of 4" for member in (first, second, third))],
    }
    found = [by_seed(cells, name) for name in chains[length]]
    seeds = [seed for seed in found[0] if all(seed in group for group in found)]
    return {seed: [group[seed] for group in found] for seed in seeds}


def family_rows(cells: Sequence[Cell], names: Sequence[str], start: str, metric: str) -> list[Row]:
    """Cost of chains of 1 to 4 members, beside training the same members alone."""
    rows = []
    alone = {name: by_seed(cells, f"{name} alone") for name in names}
    for length in (1, 2, 3, 4):
        chains = family_cost(cells, names, start, length)
        if not chains:
            continue
        macs = [sum(cell.macs for cell in chain) / 1e9 for chain in chains.values()]
        metrics = {
            metric: [chain[-1].value for chain in chains.values()],
            "total GMAC": macs,
            "seconds": [sum(cell.seconds for cell in chain) for chain in chains.values()],
        }
        members = names[-length:]
        separate = [
            sum(alone[member][seed].macs for member in members) / 1e9
            for seed in chains
            if all(seed in alone[member] for member in members)
        ]
        if len(separate) == len(macs):
            metrics["family ratio"] = [s / m for s, m in zip(separate, macs, strict=True)]
        rows.append(Row(f"chain of {length}", f"ends in {names[-1]}", metrics))
    return rows


def macs_to(
    points: Sequence[tuple[float, float]], target: float, sign: int
) -> tuple[float | None, bool]:
    """MACs at which complete schedules reach a target, and whether the smallest already does.

    Args:
        points: (MACs, metric) of one complete schedule each; interpolated in log MACs.
        target: Value to reach.
        sign: 1 where larger values are better, -1 where smaller ones are.

    Returns:
        None if no schedule reaches it; else the MACs, an upper bound if the second is True.
    """
    before: tuple[float, float] | None = None
    for macs, value in sorted(points):
        if sign * (value - target) >= 0:
            if before is None:
                return macs, True
            share = (target - before[1]) / (value - before[1])
            return before[0] * (macs / before[0]) ** share, False
        before = macs, value
    return None, False


def target_notes(
    cells: Sequence[Cell], names: Sequence[str], start: str, sign: int, gap: float
) -> list[str]:
    """What the largest member costs to the quality of individual training less ``gap``."""
    third = names[-1]
    alone = by_seed(cells, f"{third} alone")
    if not alone:
        return []

    def mean(name: str) -> tuple[float, float]:
        group = by_seed(cells, name).values()
        macs = sum(c.total_macs for c in group) / len(group)
        return macs, sum(c.value for c in group) / len(group)

    target = mean(f"{third} alone")[1] - sign * gap
    kinds = {
        "alone": [*schedules(cells, f"{third} alone"), *schedules(cells, f"{third} scratch")],
        "end of the chain of 3": schedules(cells, f"{third} {start}"),
        "end of the chain of 2": schedules(cells, f"{third} of 2"),
        "end of the chain of 4": schedules(cells, f"{third} of 4"),
    }
    lines = []
    for kind, group in kinds.items():
        if not group:
            continue
        macs, bound = macs_to([mean(name) for name in group], target, sign)
        text = "not reached"
        if macs is not None:
            text = f"{'at most ' * bound}{macs / 1e9:.4g} GMAC"
        lines.append(f"{third} to {target:.4g}, {kind}: {text} (complete schedules: {len(group)})")
    return lines


def schedules(cells: Sequence[Cell], name: str) -> list[str]:
    """Cells of this name, and those of another length: the name and a number of updates."""
    return sorted(
        {c.cell for c in cells if c.cell == name or re.fullmatch(re.escape(name) + r" \d+", c.cell)}
    )


def claims_of(
    cells: Sequence[Cell], names: Sequence[str], start: str, sign: int, gap: float
) -> list[Claim]:
    """The paper's claims, as gaps over paired seeds.

    Args:
        cells: All cells.
        names: Members; the arms are those of the last two.
        start: The arm of the chain.
        sign: 1 where larger values are better, -1 where smaller ones are.
        gap: What a lossless member may lose.
    """
    claims = []

    def add(key: str, text: str, one: str, other: str, shift: float = 0.0) -> None:
        a, b = by_seed(cells, one), by_seed(cells, other)
        gaps = [sign * (a[s].value - b[s].value) + shift for s in a if s in b]
        if gaps:
            claims.append(Claim(key, text, gaps))

    for member in names[2:]:
        for mode in ("official", "embed", "lossless"):
            pairs = (
                (f"{mode} + feature", "scratch"),
                (f"{mode} + feature", "feature only"),
                (f"{mode} + feature", mode),
                (mode, "scratch"),
            )
            for one, other in pairs:
                text = f"{member}: {one} is better than {other}, same updates"
                add(f"{member}-{one}-{other}", text, f"{member} {one}", f"{member} {other}")
        text = f"{member}: feature only is better than scratch, same updates"
        add(f"{member}-feature", text, f"{member} feature only", f"{member} scratch")
        for name in schedules(cells, f"{member} {start}"):
            text = f"{name} loses at most {gap:g} of individual training"
            add(f"{name}-lossless", text, name, f"{member} alone", gap)
    return claims


def curve(cells: Sequence[Cell], member: str, metric: str, path: Path) -> list[Path]:
    """Metric of the largest member against the compute of everything it was grown from."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(c.cell for c in cells if c.member == member)
    points = {name: list(by_seed(cells, name).values()) for name in names}
    means = {
        name: (
            sum(c.total_macs for c in group) / len(group) / 1e9,
            sum(c.value for c in group) / len(group),
        )
        for name, group in points.items()
    }
    complete = [n for n in names if "alone" in n or n == f"{member} scratch"]
    scratch = sorted(means[n] for n in complete)
    if scratch:
        # Two points are no curve: a line would claim what was not measured.
        style = "k.-" if len(scratch) > 2 else "k."
        axes.plot(*zip(*scratch, strict=True), style, label="scratch, complete schedules")
    marks = iter("osD^v<>PX*hd")
    for name in names:
        if name in complete:
            continue
        group = points[name]
        label = name.removeprefix(f"{member} ").replace("of 2", "chain of 2").replace(
            "of 4", "chain of 4"
        )  # fmt: skip
        low, high = min(c.value for c in group), max(c.value for c in group)
        x, y = means[name]
        axes.errorbar(x, y, [[y - low], [high - y]], fmt=next(marks), capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("training GMAC, all predecessors included")
    axes.set_ylabel(metric)
    axes.set_title(
        f"{member}: mean and range over seeds ({len({c.seed for c in cells})})", loc="left"
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return [path]
