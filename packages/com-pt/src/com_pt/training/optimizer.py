"""The optimizer of a stage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from com_pt.method_config import ChainConfig, StageConfig

FUSED_DEVICES = {"cuda", "xpu"}  # of which torch has fused kernels; the CPU's round differently
# Parts of names that open_clip and the released code spare from decay, whatever their shape.
NO_DECAY = ("bn", "ln", "bias", "logit_scale")


def make_optimizer(
    module: nn.Module, chain: ChainConfig, stage: StageConfig, *, fused: bool | None = None
) -> torch.optim.AdamW:
    """Make a stage's own AdamW.

    Args:
        module: What it trains.
        chain: Settings that all stages share.
        stage: Settings of this one.
        fused: Update all parameters in one kernel, which can also leave an update out; None does so on
            a card.
    """
    if fused is None:
        fused = {parameter.device.type for parameter in module.parameters()} <= FUSED_DEVICES
    return torch.optim.AdamW(
        parameter_groups(module, stage.weight_decay),
        lr=stage.lr,
        betas=chain.betas,
        eps=chain.eps,
        fused=fused or None,
    )


def unwrapped(optimizer: Any) -> Any:
    """Return torch's optimizer, whether accelerate wrapped it or not."""
    return getattr(optimizer, "optimizer", optimizer)


def is_fused(optimizer: Any) -> bool:
    """Return whether the optimizer itself leaves an update out where ``found_inf`` is 1."""
    return all(group.get("fused") for group in unwrapped(optimizer).param_groups)


def with_own_settings(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return a saved state with this optimizer's settings: torch would take over those of the state.

    A run that goes on with another decay (``--force``) must have it, and the state of a run on another
    device must not bring its choice of kernels along.
    """
    saved, own = state["param_groups"], unwrapped(optimizer).param_groups
    if len(saved) != len(own):
        return {**state}  # of another model, which torch refuses with a reason
    groups = [{**mine, "params": group["params"]} for group, mine in zip(saved, own, strict=True)]
    return {**state, "param_groups": groups}


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
