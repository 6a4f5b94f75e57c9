"""What the method must know of a decoder block: which parameters do what, without any host library.

A block is a mapping from parameter names to tensors. Linear weights are [out, in], those of experts
[experts, out, in]; biases, norm gains and router weights stand beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FACTOR_FLOOR = 1e-2  # |alpha| is kept above this, with its sign
ROWS, COLUMNS = -2, -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Touch:
    """What one channel scaling does to one parameter.

    Attributes:
        name: Parameter.
        axis: ``COLUMNS`` (inputs of a weight) or ``ROWS`` (its outputs; also biases and gains).
        index: Entry of alpha for every row or column, -1 where nothing happens.
        inverse: Divide by alpha instead of multiplying.
        offset: A norm that multiplies by ``offset + weight`` stores its gain minus this.
    """

    name: str
    axis: int
    index: Int[Tensor, " n"]
    inverse: bool
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A place where scaling by alpha and dividing by it cancel.

    Attributes:
        name: Such as "norm -> qkv".
        size: Entries of alpha.
        touches: Parameters that take part.
    """

    name: str
    size: int
    touches: tuple[Touch, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLayout:
    """Roles of the parameters of one block.

    Attributes:
        linears: Weights that are quantized.
        sites: Channel scalings that leave the block's function as it is.
        readers: Norm gain -> weights whose columns read the norm's output, the router included.
        writers: Weights and biases whose rows write to the residual stream.
        values: (weight or bias, first row, rows) of the value projection.
        outputs: Weights whose columns read the concatenated heads.
        head_dim: Features of a head.
        gain_offset: See ``Touch.offset``.
        output_norms: Norms between a writer and the residual stream; they forbid rotating it.
    """

    linears: tuple[str, ...]
    sites: tuple[Site, ...]
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[tuple[str, int, int], ...]
    outputs: tuple[str, ...]
    head_dim: int
    gain_offset: float = 0.0
    output_norms: tuple[str, ...] = ()


def clamp_factor(factor: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keep |alpha| at 1e-2 or more, with its sign; the gradient passes unchanged."""
    sign = torch.where(factor < 0, -1.0, 1.0)
    kept = torch.where(factor.abs() < FACTOR_FLOOR, sign * FACTOR_FLOOR, factor)
    return factor + (kept - factor).detach()


def scale_channels(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], factors: Sequence[Float[Tensor, " n"]]
) -> dict[str, Tensor]:
    """Apply channel scalings; the block computes the same function in exact arithmetic.

    Args:
        tensors: The block's parameters, floating point.
        sites: Places.
        factors: alpha of each site, one entry per ``Site.size``.

    Returns:
        The parameters that changed; gradients flow to ``factors``.
    """
    changed: dict[str, Tensor] = {}
    for site, factor in zip(sites, factors, strict=True):
        # The 1 at the end is what index -1 picks.
        padded = torch.cat([clamp_factor(factor), factor.new_ones(1)])
        for touch in site.touches:
            multiplier = padded[touch.index]
            if touch.inverse:
                multiplier = 1 / multiplier
            value = changed.get(touch.name, tensors[touch.name])
            if value.ndim > 1 and touch.axis == ROWS:
                multiplier = multiplier.unsqueeze(-1)
            if touch.offset:
                changed[touch.name] = (value + touch.offset) * multiplier - touch.offset
            else:
                changed[touch.name] = value * multiplier
    return changed
