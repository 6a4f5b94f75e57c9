"""The feature loss of a stage, for the widths that both models' features have."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from com_pt.method.losses import InverseFeatureLoss
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.data.loading import seed_of
from com_pt.training.tasks.base import Task
from effml_common.logging import say


def make_feature_loss(
    task: Task,
    chain: ChainConfig,
    settings: StageConfig,
    model: nn.Module,
    predecessor: nn.Module,
    examples: Any,
) -> InverseFeatureLoss:
    """Make the feature loss of a stage.

    Args:
        task: Says what the features are.
        chain: Settings that all stages share.
        settings: Settings of this one.
        model: The successor.
        predecessor: The finished smaller model, on the same device.
        examples: A small batch, which tells the widths of both models' features.

    Raises:
        ConfigError: If widths differ and no projector is allowed.
    """
    # One forward pass of each model.
    device = next(model.parameters()).device
    examples = _pytree.tree_map(lambda leaf: leaf.to(device), examples)
    widths = []
    for network in (model.eval(), predecessor):
        with torch.no_grad():
            outputs = task.features(network, examples)
        widths.append({name: outputs[name].shape[-1] for name in task.streams})

    # A projector is drawn from a seed of its own.
    torch.manual_seed(seed_of(chain.seed, settings.name, "projector"))
    loss = InverseFeatureLoss(
        {name: (widths[0][name], widths[1][name]) for name in task.streams},
        settings.feature_weight,
        cap=chain.cap,
        projector=chain.projector,
    )
    for name, layer in loss.projectors.items():
        say(f"projector for {name}: {tuple(layer.weight.shape)}")  # pyright: ignore
    return loss
