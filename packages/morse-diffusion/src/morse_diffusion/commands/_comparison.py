"""Cells of a comparison as rows, claims, speed-ups and a figure."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from effml_common.logging import say
from effml_common.report import Claim, Row
from morse_diffusion.adapters.sampling_methods import SAMPLING_METHODS
from morse_diffusion.method.metrics import speed_up

# (method, budget) -> one cell per seed: fd, sw, lsd, seconds, pattern.
Table = dict[tuple[str, int], list[dict[str, Any]]]
METRICS = {"fd": "Frechet distance", "sw": "sliced Wasserstein distance"}  # lower is better
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
REFERENCES = ("DDIM", "DPM-Solver++ 2M")  # methods whose curves speed-ups are read off
MOST_LSD_OF_MEAN = 20  # budgets above it gain little from any method


def table_rows(table: Table) -> list[Row]:
    """Return one row per method and budget, by budget."""
    rows = []
    for (method, budget), cells in sorted(table.items(), key=lambda item: (item[0][1], item[0][0])):
        full = cells[0]["pattern"].count("D")
        setting = f"{budget} LSD: {full} Dash, {len(cells[0]['pattern']) - full} other steps"
        names = (*METRICS, "lsd", "seconds")
        rows.append(Row(method, setting, {name: [cell[name] for cell in cells] for name in names}))
    return rows


def paired_claims(table: Table) -> list[Claim]:
    """Compare Morse with each of its baselines at equal budget, paired over seeds."""
    claims = []
    for ours, theirs in PAIRS:
        for budget in sorted({budget for _, budget in table}):
            if (ours, budget) not in table or (theirs, budget) not in table:
                continue
            for metric in METRICS:
                pairs = zip(table[theirs, budget], table[ours, budget], strict=True)
                text = f"{budget} LSD: {ours} has a lower {metric} than {theirs}"
                gaps = [their[metric] - our[metric] for their, our in pairs]
                claims.append(Claim(f"{metric}-{budget}-{ours}-{theirs}", text, gaps))
    return claims


def speed_up_notes(table: Table) -> list[str]:
    """Write down the speed-ups at equal quality, read off the curves of the means over seeds.

    Crowding full steps changes no count, so methods that do it are compared by cost alone.
    """
    notes = []
    for ours, theirs in (pair for pair in PAIRS if pair[1] in REFERENCES):
        budgets = [budget for method, budget in table if method == theirs]
        for metric in METRICS:
            for clock in ("lsd",) if ours.endswith("early") else ("lsd", "seconds"):
                by_budget = speed_ups(table, ours, theirs, metric, clock)
                if len(budgets) > 1 and by_budget:
                    subject = f"speed-up of {ours} over {theirs}, {metric} in {clock}"
                    notes.append(f"{subject}: {_speed_up_words(by_budget)}")
    return notes


def _speed_up_words(by_budget: Mapping[int, float | None]) -> str:
    """Return every speed-up, and the mean of those that a user would meet."""
    words = [
        f"{budget} LSD {'not on the curve' if value is None else f'{value:.2f}x'}"
        for budget, value in by_budget.items()
    ]
    useful = [
        value
        for budget, value in by_budget.items()
        if value is not None and budget <= MOST_LSD_OF_MEAN
    ]
    average = f"; mean up to 20: {sum(useful) / len(useful):.2f}x" if useful else ""
    return ", ".join(words) + average


def speed_ups(
    table: Table, ours: str, theirs: str, metric: str, clock: str
) -> dict[int, float | None]:
    """Return the speed-up per budget; None where the baseline's curve does not reach.

    Args:
        table: All cells.
        ours: Method that is judged.
        theirs: Method whose curve is read.
        metric: ``fd`` or ``sw``.
        clock: ``lsd`` or ``seconds``.
    """
    budgets = sorted(budget for method, budget in table if method == theirs)
    times = [seed_mean(table[theirs, b], clock) for b in budgets]
    curve = [seed_mean(table[theirs, b], metric) for b in budgets]
    return {
        b: speed_up(
            seed_mean(table[ours, b], clock), seed_mean(table[ours, b], metric), times, curve
        )
        for b in budgets
        if (ours, b) in table
    }


def seed_mean(cells: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the mean of one field over seeds."""
    return sum(cell[name] for cell in cells) / len(cells)


def draw_curves(table: Table, path: Path, floor: Mapping[str, float] | None) -> list[Path]:
    """Draw quality against cost.

    Args:
        table: All cells.
        path: PNG file; its folder is created if missing.
        floor: Both metrics of real images among themselves; None draws no such line.

    Returns:
        The file, or nothing without matplotlib.
    """
    if find_spec("matplotlib") is None:
        say("no picture: install morse-diffusion[plot]")
        return []
    from matplotlib.figure import Figure

    budgets = sorted({budget for _, budget in table})
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = figure.subplots(1, len(METRICS))
    for panel, metric in zip(panels, METRICS, strict=True):
        _draw_panel(panel, table, metric)
        if floor is not None:
            panel.axhline(floor[metric], color="grey", linestyle=":", label="real images")
        panel.set(xscale="log", yscale="log", xlabel="cost in Dash steps (LSD)")
        panel.set(ylabel=f"{METRICS[metric]} (lower is better)")
        panel.set_xticks(budgets, labels=[str(budget) for budget in budgets])
        panel.xaxis.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return [path]


def _draw_panel(panel: Any, table: Table, metric: str) -> None:
    """Draw one metric: a color per solver and filling, a marker for where the full steps are."""
    colors = list(dict.fromkeys(m.name.removesuffix(", early") for m in SAMPLING_METHODS))
    for method in SAMPLING_METHODS:
        budgets = sorted(b for name, b in table if name == method.name)
        cost = [seed_mean(table[method.name, b], "lsd") for b in budgets]
        values = [seed_mean(table[method.name, b], metric) for b in budgets]
        if budgets:
            color = f"C{colors.index(method.name.removesuffix(', early'))}"
            style = "-" if method.kind == "morse" else "--"
            marker = "s" if method.early == 1 else "^"
            panel.plot(cost, values, style + marker, color=color, label=method.name)
