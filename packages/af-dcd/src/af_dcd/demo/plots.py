"""The demo's pictures; nothing is drawn without matplotlib."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from af_dcd.demo.data import CLASSES, Scenes
from af_dcd.demo.models import Segmenter, predict_labels
from effml_common.logging import say

COLUMNS = ("image", "truth", "alone", "full Af-DCD", "errors alone", "errors full Af-DCD")


def draw_bar_chart(
    cells: Mapping[str, Sequence[Mapping[str, float]]], teacher_miou: float, path: Path
) -> list[Path]:
    """Draw mIoU and boundary F of each arm, with standard errors; returns the file."""
    if find_spec("matplotlib") is None:
        say("no pictures: install af-dcd[plot]")
        return []
    from matplotlib.figure import Figure

    # One panel for each metric, one bar for each arm.
    names = list(cells)
    figure = Figure(figsize=(11, 0.42 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric in zip(panels, ("mIoU", "boundary F"), strict=True):
        values = [[metrics[metric] for metrics in cells[name]] for name in names]
        means = [mean(v) for v in values]
        # One seed has no error: NaN draws no bar.
        errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else math.nan for v in values]
        colors = ["tab:blue" if "Af-DCD" in name else "lightsteelblue" for name in names]
        panel.barh(range(len(names)), means, xerr=errors, color=colors, capsize=3)
        panel.set_xlim(0, 1.1 * max(means))
        panel.set_yticks(range(len(names)), names)
        title = f"mIoU (teacher {teacher_miou:.1f})" if metric == "mIoU" else metric
        panel.set_xlabel(f"{title}, %")

    # The first arm on top.
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return [path]


def draw_label_maps(
    alone: Segmenter, full: Segmenter, tests: Scenes, path: Path, rows: int = 4
) -> list[Path]:
    """Draw image, truth, both students' maps and where they err; returns the file."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    # What is shown, on the host.
    images, truth = tests.images[:rows], tests.labels[:rows].cpu()
    maps = [predict_labels(model, images).cpu() for model in (alone, full)]

    # One row for each scene, with titles over the first.
    figure = Figure(figsize=(11, 1.9 * rows), layout="constrained")
    for row, panels in enumerate(figure.subplots(rows, len(COLUMNS))):
        gray = images[row].mean(0).cpu()
        _draw_scene(panels, gray, truth[row], [labels[row] for labels in maps])
        for panel, title in zip(panels, COLUMNS, strict=True):
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return [path]


def _draw_scene(panels: Any, gray: Tensor, truth: Tensor, predictions: list[Tensor]) -> None:
    panels[0].imshow(gray, cmap="gray", vmin=-2.5, vmax=2.5)
    for panel, labels in zip(panels[1:4], (truth, *predictions), strict=True):
        panel.imshow(labels, cmap="tab20", vmin=0, vmax=len(CLASSES), interpolation="nearest")

    # Where a prediction is wrong, and on how much of the scene.
    for panel, labels in zip(panels[4:], predictions, strict=True):
        wrong = labels != truth
        panel.imshow(wrong, cmap="Reds", vmin=0, vmax=1.3, interpolation="nearest")
        panel.set_xlabel(f"{100 * float(wrong.float().mean()):.0f} % wrong", fontsize=8)
