"""The optimizer of a stage."""

from typing import Any

import torch
from torch import Tensor, nn

from com_pt.config import ChainConfig, StageConfig

# Parts of names that open_clip and the released code spare from decay, whatever their shape.
NO_DECAY = ("bn", "ln", "bias", "logit_scale")


def make_optimizer(module: nn.Module, chain: ChainConfig, stage: StageConfig) -> torch.optim.AdamW:
    """Make a stage's own AdamW."""
    return torch.optim.AdamW(
        parameter_groups(module, stage.weight_decay),
        lr=stage.lr,
        betas=chain.betas,
        eps=chain.eps,
    )


def parameter_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups by the rule of open_clip 3.3 and of the released code.

    Vectors, scales and whatever is called a bias do not decay, so neither does Swin's
    ``relative_position_bias_table``. Positions and token tables do.
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and not any(part in name for part in NO_DECAY)
            groups[decays].append(parameter)
    decays_of_groups = ((groups[True], decay), (groups[False], 0.0))
    return [{"params": params, "weight_decay": wd} for params, wd in decays_of_groups if params]
