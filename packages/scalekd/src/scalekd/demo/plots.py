"""Figures of the demo and the study."""

from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from effml_common.logging import say
from scalekd.demo.tables import MAIN_TEACHER, ORDER, Table, standard_error, values_of


def plot(table: Table, folder: Path, name: str = "scalekd") -> list[Path]:
    """Draw accuracy by method and student, and by teacher width; nothing without matplotlib.

    Args:
        table: Accuracies.
        folder: Where the pictures go.
        name: Start of their file names.
    """
    if find_spec("matplotlib") is None:
        say("no picture: install scalekd[plot]")
        return []
    return [*_plot_methods(table, folder, name), *_plot_sizes(table, folder, name)]


def _plot_methods(table: Table, folder: Path, name: str) -> list[Path]:
    """Write one panel for each kind of student, one line for each arm."""
    from matplotlib.figure import Figure

    # Room for every arm that ran.
    kinds = sorted({kind for _, kind, _ in table})
    arms = [arm for arm in ORDER if any(key[0] == arm and key[2] == MAIN_TEACHER for key in table)]
    figure = Figure(figsize=(3.4 * len(kinds) + 1.5, 0.32 * len(arms) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]

    # Mean and standard error, the first arm at the top.
    for panel, kind in zip(panels, kinds, strict=True):
        for row, arm in enumerate(reversed(arms)):
            if (arm, kind, MAIN_TEACHER) not in table:
                continue
            values = values_of(table, (arm, kind, MAIN_TEACHER))
            colour = "tab:orange" if arm == "scalekd" else "tab:blue"
            error = standard_error(values)
            panel.errorbar(mean(values), row, xerr=error, fmt="o", color=colour, capsize=3)
        panel.set(title=kind, xlabel="top-1, %")
        panel.set_yticks(range(len(arms)), labels=list(reversed(arms)))
        panel.grid(axis="x", alpha=0.3)

    path = folder / f"{name}-methods.png"
    figure.savefig(path, dpi=120)
    return [path]


def _plot_sizes(table: Table, folder: Path, name: str) -> list[Path]:
    """Write one line for each kind of student that had teachers of several widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    lines = 0
    for kind in sorted({kind for _, kind, _ in table}):
        points = sorted(
            (int(teacher[1:]), values_of(table, (arm, k, teacher)))
            for arm, k, teacher in table
            if arm == "scalekd" and k == kind and teacher.startswith("w")
        )
        if len(points) < 2:
            continue
        lines += 1
        widths = [width for width, _ in points]
        means = [mean(values) for _, values in points]
        errors = [standard_error(values) for _, values in points]
        panel.errorbar(widths, means, yerr=errors, marker="o", capsize=3, label=kind)
    if not lines:
        return []

    panel.set(xlabel="width of the teacher", ylabel="top-1 of the student, %")
    panel.legend()
    path = folder / f"{name}-teachers.png"
    figure.savefig(path, dpi=120)
    return [path]
