"""Growth that leaves the outputs as they were.

Two ways. *Duplication* repeats channels, heads and units r times and shares every column that reads
them among the copies; it works for any LayerNorm model and a whole ratio r. *Extension* keeps the
source in the leading entries and gives the new residual channels what the norms do not notice: the
mean of the others (LayerNorm without an early norm), or zero (RMSNorm); it works for any ratio.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from com_pt.copying import embed
from com_pt.errors import GrowthError
from com_pt.layout import BLOCKS, Layout, Rule, Tower

NOISE = 0.05  # of the uneven split; equal copies would have equal gradients for ever


@dataclass(frozen=True)
class Plan:
    """How one tower is grown, and the factor of its norms' eps."""

    method: Literal["duplicate", "extend"]
    fill: Literal["mean", "zero"] = "mean"
    eps_factor: float = 1.0


def method_of(
    source: Layout, target: Layout, layers: Mapping[str, Sequence[int]]
) -> dict[str, Plan]:
    """The plan of each tower.

    Raises:
        GrowthError: If outputs cannot be kept, with the reason and the nearest mode.
    """
    plans = {name: _plan(name, source.towers[name], new) for name, new in target.towers.items()}
    return {**plans, "": plans.get("", Plan("duplicate"))}


def _plan(name: str, old: Tower, new: Tower) -> Plan:
    where = f"lossless growth of {name or 'the model'} from {old.width} to {new.width} channels"
    if new.post_norm:
        raise GrowthError(
            f"{where} is impossible: it normalises after its branches; use mode embed"
        )
    if new.norm == "rms":
        return Plan("extend", "zero", old.width / new.width)
    if new.width % old.width == 0:
        return Plan("duplicate")
    if new.early_norm:
        raise GrowthError(
            f"{where} is impossible: a norm stands before the first block and the ratio is not whole; "
            "use mode embed, or a multiple of the width"
        )
    return Plan("extend", "mean", old.width / new.width)


def tile(small: int, large: int, role: str) -> Tensor:
    """Source entry of every entry of a duplicated axis, on the CPU: k mod small, within each block.

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


def duplicate(small: Tensor, fresh: Tensor, rule: Rule, generator: torch.Generator) -> Tensor:
    """Every entry repeated; columns that read repeated entries shared unevenly among the copies.

    The shares of r copies are 1/r + 0.05 noise and sum to 1. Rows that write to the residual stream
    get the same shares in all their copies.
    """
    grown = small
    origins = [
        tile(s, n, axis.role)
        for axis, s, n in zip(rule.axes, small.shape, fresh.shape, strict=True)
    ]
    for axis, origin in enumerate(origins):
        grown = grown.index_select(axis, origin.to(grown.device))
    for axis, (role, origin) in enumerate(zip(rule.axes, origins, strict=True)):
        ratio = fresh.shape[axis] // small.shape[axis]
        if role.reads and ratio > 1:
            shares = _shares(grown.shape, axis, origin, small.shape[axis], generator)
            for other, (its_role, its_origin) in enumerate(zip(rule.axes, origins, strict=True)):
                if its_role.writes:
                    first = _first_of_each(its_origin, small.shape[other])
                    shares = shares.index_select(other, first).index_select(other, its_origin)
            # Drawn in float64 on the CPU, so that a seed means the same on every device.
            grown = grown * shares.to(grown.dtype).to(grown.device)
    return grown.clone()


def _shares(
    shape: torch.Size, axis: int, origin: Tensor, groups: int, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    ratio = shape[axis] // groups
    sums = noise.new_zeros([*shape[:axis], groups, *shape[axis + 1 :]])
    sums.index_add_(axis, origin, noise)
    return 1 / ratio + NOISE * (noise - sums.index_select(axis, origin) / ratio)


def _first_of_each(origin: Tensor, groups: int) -> Tensor:
    first = [int((origin == k).nonzero()[0]) for k in range(groups)]
    return torch.tensor(first, device=origin.device)


def extend(small: Tensor, fresh: Tensor, rule: Rule, *, fill: Literal["mean", "zero"]) -> Tensor:
    """The source in the leading entries, and new residual channels that its norms do not notice.

    With W_s of W_l channels in use the variance (LayerNorm) or mean square (RMSNorm) falls by
    W_s/W_l, so the gains grow by sqrt(W_s/W_l) times what they were: the norm divides by less.

    Raises:
        GrowthError: If the tensor has LayerScale, or outputs would get new entries.
    """
    if small.dim() == 0 or small.shape == fresh.shape:
        return small.clone()
    sizes = list(zip(rule.axes, small.shape, fresh.shape, strict=True))
    for axis, s, n in sizes:
        if axis.role in ("EMBED", "CLASS") and s != n:
            raise GrowthError(f"{axis.role} grows from {s} to {n}; keep it, or use mode embed")
    if rule.kind == "scale":
        raise GrowthError(
            "LayerScale does not allow a ratio that is not whole; use mode embed, or a multiple"
        )
    if rule.kind == "norm":
        share = small.shape[0] / fresh.shape[0]
        is_bias = rule.pattern.endswith("bias")
        grown = torch.zeros_like(fresh) if is_bias else fresh.clone()
        grown[: small.shape[0]] = small if is_bias else small * math.sqrt(share)
        return grown
    grown = embed(small, fresh, rule)
    for dim, (axis, s, n) in enumerate(sizes):
        if axis.reads and axis.role != "WIDTH" and s < n:
            grown.narrow(dim, s, n - s).zero_()
    for dim, (axis, s, n) in enumerate(sizes):
        if axis.writes and s < n:
            old = grown.narrow(dim, 0, s).mean(dim, keepdim=True)
            grown.narrow(dim, s, n - s).copy_(old if fill == "mean" else torch.zeros_like(old))
    return grown
