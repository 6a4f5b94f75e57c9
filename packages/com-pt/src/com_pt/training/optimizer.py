"""The optimizer of a stage."""

from typing import Any

import torch
from torch import Tensor, nn

from com_pt.config import ChainConfig, StageConfig

NO_DECAY = (
    "positional_embedding", "pos_embed", "cls_token", "class_embedding", "reg_token", "cls_emb",
    "relative_position_bias_table", "logit_scale", "logit_bias",
)  # fmt: skip


def make_optimizer(module: nn.Module, chain: ChainConfig, stage: StageConfig) -> torch.optim.AdamW:
    """Make a stage's own AdamW."""
    return torch.optim.AdamW(
        parameter_groups(module, stage.weight_decay),
        lr=stage.lr,
        betas=chain.betas,
        eps=chain.eps,
    )


def parameter_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: no decay for vectors, scales, tokens and positions."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and name.rpartition(".")[2] not in NO_DECAY
            groups[decays].append(parameter)
    decays_of_groups = ((groups[True], decay), (groups[False], 0.0))
    return [{"params": params, "weight_decay": wd} for params, wd in decays_of_groups if params]
