"""Growth that leaves the outputs as they were.

There are two ways. *Duplication* repeats channels, heads and units r times and shares every column
that reads them among the copies; it works for any LayerNorm model and a whole ratio r. *Extension*
keeps the source in the leading entries and gives the new residual channels what the norms do not
notice: the mean of the others (LayerNorm without an early norm), or zero (RMSNorm); it works for any
ratio.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from com_pt.errors import GrowthError
from com_pt.method.copying import copy_leading_entries
from com_pt.method.layout import BLOCKS, Layout, Rule, Tower

# Deviation of the copies' shares; equal copies would have equal gradients for ever.
SHARE_NOISE = 0.05


@dataclass(frozen=True)
class TowerPlan:
    """How one tower is grown, and the factor of its norms' eps."""

    method: Literal["duplicate", "extend"]
    fill: Literal["mean", "zero"] = "mean"
    eps_factor: float = 1.0


def plan_towers(source: Layout, target: Layout) -> dict[str, TowerPlan]:
    """Choose the way of each tower, by its name.

    Raises:
        GrowthError: If outputs cannot be kept, with the reason and the nearest mode.
    """
    plans = {
        name: _plan_tower(name, source.towers[name], tower) for name, tower in target.towers.items()
    }
    return {**plans, "": plans.get("", TowerPlan("duplicate"))}


def _plan_tower(name: str, small: Tower, large: Tower) -> TowerPlan:
    growth = (
        f"lossless growth of {name or 'the model'} from {small.width} to {large.width} channels"
    )
    if large.post_norm:
        raise GrowthError(
            f"{growth} is impossible: it normalises after its branches; use mode embed"
        )

    # An RMSNorm does not notice zeros.
    if large.norm == "rms":
        return TowerPlan("extend", "zero", small.width / large.width)

    # A LayerNorm does not notice copies, nor the mean if nothing is added before it.
    if large.width % small.width == 0:
        return TowerPlan("duplicate")
    if large.early_norm:
        raise GrowthError(
            f"{growth} is impossible: a norm stands before the first block and the ratio is not whole; "
            "use mode embed, or a multiple of the width"
        )
    return TowerPlan("extend", "mean", small.width / large.width)


def duplicate_channels(
    small: Tensor, fresh: Tensor, rule: Rule, generator: torch.Generator
) -> Tensor:
    """Repeat every entry, and share columns that read repeated entries among the copies.

    The shares of r copies are 1/r + 0.05 noise and sum to 1. Rows that write to the residual stream
    get the same shares in all their copies.

    Args:
        small: Tensor of the small model.
        fresh: The large model's, of which only the shape matters.
        rule: Roles of the axes of both.
        generator: The source of the noise; on the CPU, so that a seed means the same on every device.

    Raises:
        GrowthError: If a ratio is not whole, or an axis must keep its meaning.
    """
    # Repeat the entries of each axis.
    grown = small
    origins = [
        tile_axis(small_size, large_size, axis.role)
        for axis, small_size, large_size in zip(rule.axes, small.shape, fresh.shape, strict=True)
    ]
    for dim, origin in enumerate(origins):
        grown = grown.index_select(dim, origin.to(grown.device))

    # Share what is read several times now.
    for dim, (axis, origin) in enumerate(zip(rule.axes, origins, strict=True)):
        if not axis.reads or fresh.shape[dim] == small.shape[dim]:
            continue
        shares = _draw_shares(grown.shape, dim, origin, small.shape[dim], generator)
        for row_dim, (row_axis, row_origin) in enumerate(zip(rule.axes, origins, strict=True)):
            if row_axis.writes:
                first = _first_copies(row_origin, small.shape[row_dim])
                shares = shares.index_select(row_dim, first).index_select(row_dim, row_origin)
        grown = grown * shares.to(grown.dtype).to(grown.device)
    return grown.clone()


def tile_axis(small: int, large: int, role: str) -> Tensor:
    """Return the source entry of every entry of a duplicated axis: k mod small, within each block.

    Returns:
        Indices [large] on the CPU.

    Raises:
        GrowthError: If the ratio is not whole, or the axis is a result that must keep its meaning.
    """
    if small == large:
        return torch.arange(large, device="cpu")
    if role in ("CLASS", "VOCAB", "POS", "FIXED") or large % small:
        raise GrowthError(
            f"a {role} axis of {small} cannot be duplicated to {large}; keep it, use a whole multiple, "
            "or mode embed"
        )
    blocks = BLOCKS.get(role, 1)
    within = torch.arange(large // blocks, device="cpu") % (small // blocks)
    starts = torch.arange(blocks, device="cpu").unsqueeze(1) * (small // blocks)
    return (starts + within).flatten()


def _draw_shares(
    shape: torch.Size, dim: int, origin: Tensor, groups: int, generator: torch.Generator
) -> Tensor:
    """Draw shares in float64 on the CPU, which sum to 1 over the copies of each source entry."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    ratio = shape[dim] // groups
    sums = noise.new_zeros([*shape[:dim], groups, *shape[dim + 1 :]])
    sums.index_add_(dim, origin, noise)
    return 1 / ratio + SHARE_NOISE * (noise - sums.index_select(dim, origin) / ratio)


def _first_copies(origin: Tensor, groups: int) -> Tensor:
    """Return the index of the first copy of each source entry."""
    first = [int((origin == k).nonzero()[0]) for k in range(groups)]
    return torch.tensor(first, device=origin.device)


def extend_channels(
    small: Tensor, fresh: Tensor, rule: Rule, *, fill: Literal["mean", "zero"]
) -> Tensor:
    """Keep the source in the leading entries, and fill new residual channels unseen by the norms.

    With W_s of W_l channels in use the variance (LayerNorm) or mean square (RMSNorm) falls by
    W_s/W_l, so the gains grow by sqrt(W_s/W_l) times what they were: the norm divides by less.

    Args:
        small: Tensor of the small model.
        fresh: The large model's, as it was initialised; not changed.
        rule: Roles of the axes of both.
        fill: What the new residual channels hold: the mean of the others, or zero.

    Raises:
        GrowthError: If the tensor has LayerScale, or outputs would get new entries.
    """
    if small.dim() == 0 or small.shape == fresh.shape:
        return small.clone()

    # Results and layers with a scale of their own cannot be extended.
    sizes = list(zip(rule.axes, small.shape, fresh.shape, strict=True))
    for axis, small_size, large_size in sizes:
        if axis.role in ("EMBED", "CLASS") and small_size != large_size:
            raise GrowthError(
                f"{axis.role} grows from {small_size} to {large_size}; keep it, or use mode embed"
            )
    if rule.kind == "scale":
        raise GrowthError(
            "LayerScale does not allow a ratio that is not whole; use mode embed, or a multiple"
        )
    if rule.kind == "norm":
        return _extend_norm(small, fresh, is_bias=rule.pattern.endswith("bias"))

    # New hidden units and heads are not read, so they do not disturb.
    grown = copy_leading_entries(small, fresh, rule)
    for dim, (axis, small_size, large_size) in enumerate(sizes):
        if axis.reads and axis.role != "WIDTH" and small_size < large_size:
            grown.narrow(dim, small_size, large_size - small_size).zero_()

    # New residual channels hold what the norms do not notice.
    for dim, (axis, small_size, large_size) in enumerate(sizes):
        if axis.writes and small_size < large_size:
            mean = grown.narrow(dim, 0, small_size).mean(dim, keepdim=True)
            unseen = mean if fill == "mean" else torch.zeros_like(mean)
            grown.narrow(dim, small_size, large_size - small_size).copy_(unseen)
    return grown


def _extend_norm(small: Tensor, fresh: Tensor, *, is_bias: bool) -> Tensor:
    if is_bias:
        grown = torch.zeros_like(fresh)
        grown[: small.shape[0]] = small
        return grown
    grown = fresh.clone()
    grown[: small.shape[0]] = small * math.sqrt(small.shape[0] / fresh.shape[0])
    return grown


def eps_factors(plans: Mapping[str, TowerPlan]) -> dict[str, float]:
    """Return, for each tower, what the eps of its norms must be multiplied by."""
    return {tower: plan.eps_factor for tower, plan in plans.items()}
