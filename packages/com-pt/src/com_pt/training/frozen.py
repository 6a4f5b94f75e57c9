"""The predecessor during a stage: frozen, and held in the type that its products are computed in."""

from typing import Any

import torch
from torch import nn

AUTOCAST_LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
)  # their products run in autocast's type; norms and embeddings do not


def freeze(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on a device, in evaluation mode, without gradients."""
    return model.to(device).eval().requires_grad_(False)


def hold_in_autocast_type(model: nn.Module, accelerator: Any) -> None:
    """Convert the weights of a frozen model that autocast would convert in every forward pass.

    Norms, position tables and embeddings stay in float32, and so do the outputs' losses.
    """
    if accelerator.mixed_precision != "bf16":
        return
    for layer in model.modules():
        if isinstance(layer, AUTOCAST_LAYERS):
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
