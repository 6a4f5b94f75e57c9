"""Tables, claims and figures of a comparison of ways to train a family."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from com_pt.demo.arms import Cell
from effml_common.report import Claim, Row


def by_seed(cells: Sequence[Cell], name: str) -> dict[int, Cell]:
    """Return the cells of a name, by seed."""
    return {cell.seed: cell for cell in sorted(cells, key=lambda c: c.seed) if cell.cell == name}


def cell_rows(cells: Sequence[Cell], metric: str) -> list[Row]:
    """Return a row per cell name, with values over seeds."""
    # Small members first.
    by_size = sorted(cells, key=lambda c: (c.forward, c.cell))
    rows = []
    for name in dict.fromkeys(cell.cell for cell in by_size):
        group = list(by_seed(cells, name).values())
        metrics = {
            metric: [c.value for c in group],
            "total GMAC": [c.total_macs / 1e9 for c in group],
            "own GMAC": [c.macs / 1e9 for c in group],
            "seconds": [c.seconds for c in group],
        }

        # Only what was grown has a value at the start.
        starts = [c.start for c in group if c.start is not None]
        if starts:
            metrics["at the start"] = starts
        rows.append(Row(name, f"{group[0].steps} updates", metrics))
    return rows


def chains_by_seed(
    cells: Sequence[Cell], names: Sequence[str], start: str, length: int
) -> dict[int, list[Cell]]:
    """Return, by seed, the cells of a chain of ``length`` members that ends in the largest."""
    smallest, first, second, third = names
    chains = {
        1: [f"{third} alone"],
        2: [f"{second} alone", f"{third} of 2"],
        3: [f"{first} alone", f"{second} {start}", f"{third} {start}"],
        4: [f"{smallest} alone", *(f"{member} of 4" for member in (first, second, third))],
    }
    members = [by_seed(cells, name) for name in chains[length]]
    seeds = [seed for seed in members[0] if all(seed in member for member in members)]
    return {seed: [member[seed] for member in members] for seed in seeds}


def family_rows(cells: Sequence[Cell], names: Sequence[str], start: str, metric: str) -> list[Row]:
    """Return the cost of chains of 1 to 4 members, beside training the same members alone."""
    rows = []
    alone = {name: by_seed(cells, f"{name} alone") for name in names}
    for length in (1, 2, 3, 4):
        chains = chains_by_seed(cells, names, start, length)
        if not chains:
            continue

        # The chain itself.
        macs = [sum(cell.macs for cell in chain) / 1e9 for chain in chains.values()]
        metrics = {
            metric: [chain[-1].value for chain in chains.values()],
            "total GMAC": macs,
            "seconds": [sum(cell.seconds for cell in chain) for chain in chains.values()],
        }

        # Its members alone, where every one of them was trained with these seeds.
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
    """Return the MACs at which complete schedules reach a target, and whether the smallest already does.

    Args:
        points: (MACs, metric) of one complete schedule each; interpolated in log MACs.
        target: Value to reach.
        sign: 1 where larger values are better, -1 where smaller ones are.

    Returns:
        None if no schedule reaches it; else the MACs, an upper bound if the second is True.
    """
    smaller: tuple[float, float] | None = None
    for macs, value in sorted(points):
        if sign * (value - target) >= 0:
            if smaller is None:
                return macs, True
            share = (target - smaller[1]) / (value - smaller[1])
            return smaller[0] * (macs / smaller[0]) ** share, False
        smaller = macs, value
    return None, False


def target_notes(
    cells: Sequence[Cell], names: Sequence[str], start: str, sign: int, gap: float
) -> list[str]:
    """Say what the largest member costs to the quality of individual training less ``gap``.

    Args:
        cells: All cells.
        names: Members, from small to large.
        start: The arm of the chain.
        sign: 1 where larger values are better, -1 where smaller ones are.
        gap: What the member may lose of individual training.
    """
    # The target is individual training, as far as it was measured.
    largest = names[-1]
    if not by_seed(cells, f"{largest} alone"):
        return []
    target = mean_point(cells, f"{largest} alone")[1] - sign * gap
    kinds = {
        "alone": [*schedules(cells, f"{largest} alone"), *schedules(cells, f"{largest} scratch")],
        "end of the chain of 3": schedules(cells, f"{largest} {start}"),
        "end of the chain of 2": schedules(cells, f"{largest} of 2"),
        "end of the chain of 4": schedules(cells, f"{largest} of 4"),
    }

    # One line for each way that was measured.
    lines = []
    for kind, names_of_kind in kinds.items():
        if not names_of_kind:
            continue
        points = [mean_point(cells, name) for name in names_of_kind]
        macs, is_bound = macs_to(points, target, sign)
        cost = "not reached"
        if macs is not None:
            cost = f"{'at most ' * is_bound}{macs / 1e9:.4g} GMAC"
        count = f"complete schedules: {len(names_of_kind)}"
        lines.append(f"{largest} to {target:.4g}, {kind}: {cost} ({count})")
    return lines


def mean_point(cells: Sequence[Cell], name: str) -> tuple[float, float]:
    """Return mean MACs, all predecessors included, and mean value of the cells of a name."""
    group = by_seed(cells, name).values()
    macs = sum(c.total_macs for c in group) / len(group)
    return macs, sum(c.value for c in group) / len(group)


def schedules(cells: Sequence[Cell], name: str) -> list[str]:
    """Return the cells of this name, and those of another length: the name and a number of updates."""
    return sorted(
        {c.cell for c in cells if c.cell == name or re.fullmatch(re.escape(name) + r" \d+", c.cell)}
    )


def paper_claims(
    cells: Sequence[Cell], names: Sequence[str], start: str, sign: int, gap: float
) -> list[Claim]:
    """Return the paper's claims, as gaps over paired seeds.

    Args:
        cells: All cells.
        names: Members; the arms are those of the last two.
        start: The arm of the chain.
        sign: 1 where larger values are better, -1 where smaller ones are.
        gap: What a lossless member may lose.
    """
    claims = []

    def add(key: str, text: str, better: str, worse: str, shift: float = 0.0) -> None:
        first, second = by_seed(cells, better), by_seed(cells, worse)
        gaps = [sign * (first[s].value - second[s].value) + shift for s in first if s in second]
        if gaps:
            claims.append(Claim(key, text, gaps))

    # Growth with and without the feature loss, against its parts.
    for member in names[2:]:
        for mode in ("official", "embed", "lossless"):
            pairs = (
                (f"{mode} + feature", "scratch"),
                (f"{mode} + feature", "feature only"),
                (f"{mode} + feature", mode),
                (mode, "scratch"),
            )
            for better, worse in pairs:
                text = f"{member}: {better} is better than {worse}, same updates"
                add(f"{member}-{better}-{worse}", text, f"{member} {better}", f"{member} {worse}")

        # The feature loss by itself, and the chain against individual training.
        text = f"{member}: feature only is better than scratch, same updates"
        add(f"{member}-feature", text, f"{member} feature only", f"{member} scratch")
        for name in schedules(cells, f"{member} {start}"):
            text = f"{name} loses at most {gap:g} of individual training"
            add(f"{name}-lossless", text, name, f"{member} alone", gap)
    return claims


def draw_curve(cells: Sequence[Cell], member: str, metric: str, path: Path) -> list[Path]:
    """Draw a member's metric against the compute of everything it was grown from.

    Args:
        cells: All cells.
        member: The largest one, usually.
        metric: Label of the values.
        path: PNG file to write.

    Returns:
        The file; nothing where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw_points(axes, cells, member)

    # Labels and legend.
    axes.set_xscale("log")
    axes.set_xlabel("training GMAC, all predecessors included")
    axes.set_ylabel(metric)
    seeds = len({c.seed for c in cells})
    axes.set_title(f"{member}: mean and range over seeds ({seeds})", loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return [path]


def _draw_points(axes: Any, cells: Sequence[Cell], member: str) -> None:
    """Draw complete schedules from scratch as a curve, and every other way as a mark."""
    names = list(dict.fromkeys(c.cell for c in cells if c.member == member))
    means = {name: mean_point(cells, name) for name in names}

    # Two points are no curve: a line would claim what was not measured.
    complete = [name for name in names if "alone" in name or name == f"{member} scratch"]
    points = sorted((means[name][0] / 1e9, means[name][1]) for name in complete)
    if points:
        style = "k.-" if len(points) > 2 else "k."
        axes.plot(*zip(*points, strict=True), style, label="scratch, complete schedules")

    # Means and ranges over seeds.
    marks = iter("osD^v<>PX*hd")
    for name in (name for name in names if name not in complete):
        label = name.removeprefix(f"{member} ")
        label = label.replace("of 2", "chain of 2").replace("of 4", "chain of 4")
        values = [cell.value for cell in by_seed(cells, name).values()]
        macs, mean = means[name]
        error = [[mean - min(values)], [max(values) - mean]]
        axes.errorbar(macs / 1e9, mean, error, fmt=next(marks), capsize=3, label=label)
