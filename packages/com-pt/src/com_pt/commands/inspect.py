"""``com-pt inspect``: a model's axes, sizes and cost, without weights."""

from typing import Any

import torch

from com_pt.adapters.layouts import layout_of
from com_pt.config import InspectConfig
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.report import Summary


def inspect(config: InspectConfig) -> Summary:
    """Describe a model without weights."""
    # Build the model without memory for its weights.
    task: Any = (
        ClipTask({"captions": config.captions}) if config.family == "clip" else ClassifyTask({})
    )
    with torch.device("meta"):
        model = task.build(config.model)

    # Sum up the parameters by what their axes stand for.
    layout = layout_of(model)
    numbers_by_axes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        axes = " x ".join(axis.role for axis in layout.rule_of(name).axes) or "scalar"
        numbers_by_axes[axes] = numbers_by_axes.get(axes, 0) + parameter.numel()

    return Summary(
        {
            "family": layout.name,
            "parameters": sum(numbers_by_axes.values()),
            "forward GMAC": task.macs(config.model) / 1e9,
            "towers": {name or "model": vars(tower) for name, tower in layout.towers.items()},
            "fixed along a chain": {k: str(v) for k, v in layout.fixed.items()},
            "parameters by axes": numbers_by_axes,
        }
    )
