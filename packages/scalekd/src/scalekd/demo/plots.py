"""Figures of the demo and the study."""

from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from effml_common.logging import say
from scalekd.demo.tables import MAIN, ORDER, Table, standard_error, values_of


def plot(table: Table, folder: Path, name: str = "scalekd") -> list[Path]:
    """Accuracy by method and student, and by teacher width; nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        say("no picture: install scalekd[plot]")
        return []
    from matplotlib.figure import Figure

    kinds = sorted({kind for _, kind, _ in table})
    arms = [arm for arm in ORDER if any(key[0] == arm and key[2] == MAIN for key in table)]
    figure = Figure(figsize=(3.4 * len(kinds) + 1.5, 0.32 * len(arms) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for row, arm in enumerate(reversed(arms)):
            if (arm, kind, MAIN) not in table:
                continue
            values = values_of(table, (arm, kind, MAIN))
            colour = "tab:orange" if arm == "scalekd" else "tab:blue"
            panel.errorbar(
                mean(values), row, xerr=standard_error(values), fmt="o", color=colour, capsize=3
            )
        panel.set(title=kind, xlabel="top-1, %")
        panel.set_yticks(range(len(arms)), labels=list(reversed(arms)))
        panel.grid(axis="x", alpha=0.3)
    path = folder / f"{name}-methods.png"
    figure.savefig(path, dpi=120)
    return [path, *_plot_sizes(table, folder, name)]


def _plot_sizes(table: Table, folder: Path, name: str) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    drawn = False
    for kind in sorted({kind for _, kind, _ in table}):
        found = sorted(
            (int(t[1:]), values_of(table, (a, k, t)))
            for a, k, t in table
            if a == "scalekd" and k == kind and t.startswith("w")
        )
        if len(found) > 1:
            drawn = True
            widths = [width for width, _ in found]
            means, errors = [mean(v) for _, v in found], [standard_error(v) for _, v in found]
            panel.errorbar(widths, means, yerr=errors, marker="o", capsize=3, label=kind)
    if not drawn:
        return []
    panel.set(xlabel="width of the teacher", ylabel="top-1 of the student, %")
    panel.legend()
    path = folder / f"{name}-teachers.png"
    figure.savefig(path, dpi=120)
    return [path]
