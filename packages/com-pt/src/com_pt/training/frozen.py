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


def train_mode(module: nn.Module) -> None:
    """Put a module in training mode, but for parts that are frozen as a whole.

    Those compute what they did before: batch norms keep their statistics, and nothing is dropped out.
    """
    module.train()
    for part in module.modules():
        parameters = [*part.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()


def hold_in_autocast_type(model: nn.Module, accelerator: Any) -> None:
    """Convert the weights of a frozen model that autocast would convert in every forward pass.

    Norms, position tables and embeddings stay in float32, and so do the outputs' losses. A head that is
    tied to an embedding is one.
    """
    if accelerator.mixed_precision != "bf16":
        return
    layers = [*model.modules()]
    others = [layer for layer in layers if not isinstance(layer, AUTOCAST_LAYERS)]
    kept = {id(parameter) for layer in others for parameter in layer.parameters(recurse=False)}
    for layer in layers:
        if isinstance(layer, AUTOCAST_LAYERS):
            for parameter in layer.parameters(recurse=False):
                if id(parameter) not in kept:
                    parameter.data = parameter.data.to(torch.bfloat16)
