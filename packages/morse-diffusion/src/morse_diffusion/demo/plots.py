"""Figures of the demo."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


def draw_sample_grid(
    grids: Mapping[tuple[str, int], Tensor], budget: int, path: Path
) -> list[Path]:
    """Draw the samples of every arm at one budget, a line each.

    Args:
        grids: Images [n, c, h, w] in [-1, 1] by arm and budget, from the same noise.
        budget: In LSD.
        path: PNG file.

    Returns:
        The file, or nothing without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    names = [name for name, b in grids if b == budget]
    figure = Figure(figsize=(10, 1.15 * len(names)), layout="constrained")
    for panel, name in zip(figure.subplots(len(names), 1), names, strict=True):
        strip = torch.cat(list(grids[name, budget]), dim=2).permute(1, 2, 0)
        panel.imshow(((strip + 1) / 2).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        panel.set_axis_off()
        panel.set_title(f"{name}, {budget} LSD", fontsize=9, loc="left")
    figure.savefig(path, dpi=120)
    return [path]
