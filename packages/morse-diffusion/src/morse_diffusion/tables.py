"""Cells of a comparison as rows, claims, speed-ups and a figure."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from effml_common.logging import say
from effml_common.report import Claim, Row
from morse_diffusion.comparison import ARMS
from morse_diffusion.evaluation import speed_up

# (arm, budget) -> one cell per seed: fd, sw, lsd, seconds, pattern.
Table = dict[tuple[str, int], list[dict[str, Any]]]
METRICS = ("fd", "sw")
PAIRS = (
    ("Morse on DDIM", "DDIM"),
    ("Morse on 2M", "DPM-Solver++ 2M"),
    ("Morse on DDIM", "extrapolation on DDIM"),
    ("Morse on DDIM", "DeepCache on DDIM"),
    ("Morse on 2M", "UniPC"),
    ("Morse on DDIM, early", "DDIM"),
    ("Morse on DDIM, early", "DDIM, early"),
    ("Morse on DDIM, early", "extrapolation on DDIM, early"),
    ("Morse on 2M, early", "DPM-Solver++ 2M"),
    ("Morse on 2M, early", "DPM-Solver++ 2M, early"),
    ("Morse on 2M, early", "UniPC"),
)
BASELINES = ("DDIM", "DPM-Solver++ 2M")


def rows_of(table: Table) -> list[Row]:
    """One row per arm and budget."""
    rows = []
    for (arm, budget), runs in sorted(table.items(), key=lambda item: (item[0][1], item[0][0])):
        full = runs[0]["pattern"].count("D")
        setting = f"{budget} LSD: {full} Dash, {len(runs[0]['pattern']) - full} other steps"
        names = (*METRICS, "lsd", "seconds")
        rows.append(Row(arm, setting, {name: [run[name] for run in runs] for name in names}))
    return rows


def claims_of(table: Table) -> list[Claim]:
    """Morse against each rival at equal budget, paired over seeds."""
    found = []
    for ours, theirs in PAIRS:
        for budget in sorted({budget for _, budget in table}):
            if (ours, budget) not in table or (theirs, budget) not in table:
                continue
            for metric in METRICS:
                pairs = zip(table[theirs, budget], table[ours, budget], strict=True)
                text = f"{budget} LSD: {ours} has a lower {metric} than {theirs}"
                gaps = [their[metric] - our[metric] for their, our in pairs]
                found.append(Claim(f"{metric}-{budget}-{ours}-{theirs}", text, gaps))
    return found


def speed_up_notes(table: Table) -> list[str]:
    """Speed-up at equal quality, read off the curves of the means over seeds.

    Crowding full steps changes no count, so arms that do it are compared by cost alone.
    """
    lines = []
    for ours, theirs in (pair for pair in PAIRS if pair[1] in BASELINES):
        budgets = sorted(budget for arm, budget in table if arm == theirs)
        for metric in METRICS:
            for clock in ("lsd",) if ours.endswith("early") else ("lsd", "seconds"):
                found = speed_ups(table, ours, theirs, metric, clock)
                told = [
                    f"{b} LSD {'not on the curve' if s is None else f'{s:.2f}x'}"
                    for b, s in found.items()
                ]
                useful = [s for b, s in found.items() if s is not None and b <= 20]
                average = f"; mean up to 20: {sum(useful) / len(useful):.2f}x" if useful else ""
                if len(budgets) > 1 and told:
                    what = f"speed-up of {ours} over {theirs}, {metric} in {clock}"
                    lines.append(f"{what}: {', '.join(told)}{average}")
    return lines


def speed_ups(
    table: Table, ours: str, theirs: str, metric: str, clock: str
) -> dict[int, float | None]:
    """Speed-up per budget; None where the baseline's curve does not reach."""
    budgets = sorted(budget for arm, budget in table if arm == theirs)
    times = [mean(table[theirs, b], clock) for b in budgets]
    curve = [mean(table[theirs, b], metric) for b in budgets]
    return {
        b: speed_up(mean(table[ours, b], clock), mean(table[ours, b], metric), times, curve)
        for b in budgets
        if (ours, b) in table
    }


def mean(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean of one field over seeds."""
    return sum(run[name] for run in runs) / len(runs)


def curves(table: Table, path: Path, floor: Mapping[str, float] | None) -> list[Path]:
    """Draw quality against cost; returns the figure, or nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        say("no picture: install morse-diffusion[plot]")
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(METRICS))
    kinds = list(dict.fromkeys(arm.name.removesuffix(", early") for arm in ARMS))
    for panel, metric in zip(panels, METRICS, strict=True):
        for arm in ARMS:
            budgets = sorted(b for name, b in table if name == arm.name)
            cost = [mean(table[arm.name, b], "lsd") for b in budgets]
            values = [mean(table[arm.name, b], metric) for b in budgets]
            if budgets:
                color = f"C{kinds.index(arm.name.removesuffix(', early'))}"
                style = ("-" if arm.method == "morse" else "--") + ("s" if arm.early == 1 else "^")
                panel.plot(cost, values, style, color=color, label=arm.name)
        if floor is not None:
            panel.axhline(floor[metric], color="grey", linestyle=":", label="real images")
        panel.set(xscale="log", yscale="log", xlabel="cost in Dash steps (LSD)", ylabel=metric)
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return [path]
