"""What the method must know of a decoder block: which parameter does what, without any host library.

A block is a mapping from parameter names to tensors. Linear weights are [out, in], those of experts
[experts, out, in]; biases, norm gains and router weights stand beside them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_FACTOR = 1e-2  # |alpha| is kept at this or above, with its sign
ROWS, COLUMNS = -2, -1  # axes of a linear weight: its outputs, its inputs
WEIGHT_SUFFIX = ".weight"  # what a linear layer's name lacks of the name of its weight


def layer_name(block: int, weight: str) -> str:
    """Return how messages and patterns call a layer, such as "layers.0.mlp.down_proj"."""
    return f"layers.{block}.{weight.removesuffix(WEIGHT_SUFFIX)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledParameter:
    """What the channel scaling at one site does to one parameter.

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
class ScalingSite:
    """A place in a block where multiplying channels by alpha and dividing them by it cancel.

    Attributes:
        name: Such as "norm -> qkv".
        size: Entries of alpha.
        parameters: What happens to each parameter that takes part.
    """

    name: str
    size: int
    parameters: tuple[ScaledParameter, ...]


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
        gain_offset: See ``ScaledParameter.offset``.
        output_norms: Norms between a writer and the residual stream; they forbid rotating it.
    """

    linears: tuple[str, ...]
    sites: tuple[ScalingSite, ...]
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[tuple[str, int, int], ...]
    outputs: tuple[str, ...]
    head_dim: int
    gain_offset: float = 0.0
    output_norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Linear layers that read the same input.

    Attributes:
        weights: Names of their weights.
        stream_module: The module of the block whose input is the residual stream that the layer's output
            is added to; ``None`` for layers that do not write to the stream.
        ends_attention: Whether the group is the output projection of the attention.
        begins_mlp: The norm in front of the MLP, if the group reads it.
    """

    weights: tuple[str, ...]
    stream_module: str | None
    ends_attention: bool = False
    begins_mlp: str | None = None


def layer_groups(layout: BlockLayout, ignored: Collection[str] = ()) -> list[LayerGroup]:
    """Return the linear layers of a block in computing order; fused experts are left out.

    Layers that are ignored are in no group, and a group has at least one layer.

    The layers that read a norm come before the layer that writes to the residual stream. The writer aims
    at the stream itself, unless a norm stands between them (Gemma): then it aims at its own output.
    """
    (attention_norm, attention), (mlp_norm, mlp) = layout.readers.items()
    output, down = layout.writers[:2]

    # What a norm reads is the stream to which the layers behind it add.
    before_attention, before_mlp = (
        norm.removesuffix(WEIGHT_SUFFIX) for norm in (attention_norm, mlp_norm)
    )
    aims_at_stream = not layout.output_norms
    groups = (
        LayerGroup(attention, None),
        LayerGroup((output,), before_attention if aims_at_stream else None, ends_attention=True),
        LayerGroup(mlp, None, begins_mlp=before_mlp),
        LayerGroup((down,), before_mlp if aims_at_stream else None),
    )

    # Routers are not quantized, and fused experts have no weight of a linear layer.
    quantized = {name for name in layout.linears if name.endswith(WEIGHT_SUFFIX)}
    quantized -= set(ignored)
    of_linears = [
        replace(group, weights=tuple(name for name in group.weights if name in quantized))
        for group in groups
    ]
    return [group for group in of_linears if group.weights]


def expert_weights(layout: BlockLayout, ignored: Collection[str] = ()) -> tuple[str, ...]:
    """Return the weights of fused experts in computing order: gate and up, down; none if it is dense."""
    experts = (name for name in layout.linears if not name.endswith(WEIGHT_SUFFIX))
    return tuple(name for name in experts if name not in ignored)


def mlp_norm(layout: BlockLayout) -> str:
    """Return the norm that MLP or experts read, as a module of the block."""
    _, norm = layout.readers
    return norm.removesuffix(WEIGHT_SUFFIX)


def reading_module(weight: str) -> str:
    """Return the module of the block that is called with what a weight multiplies."""
    return weight.rpartition(".")[0]


def clamp_factor(factor: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keep |alpha| at 0.01 or more, with its sign; the gradient passes unchanged."""
    sign = torch.where(factor < 0, -1.0, 1.0)
    clamped = torch.where(factor.abs() < SMALLEST_FACTOR, sign * SMALLEST_FACTOR, factor)
    return factor + (clamped - factor).detach()


def scale_channels(
    tensors: Mapping[str, Tensor],
    sites: Sequence[ScalingSite],
    factors: Sequence[Float[Tensor, " n"]],
) -> dict[str, Tensor]:
    """Apply channel scalings; the block computes the same function in exact arithmetic.

    Args:
        tensors: The block's parameters, floating point.
        sites: Places where scaling cancels.
        factors: alpha of each site, one entry per ``ScalingSite.size``.

    Returns:
        The parameters that changed; gradients flow to ``factors``.
    """
    changed: dict[str, Tensor] = {}
    for site, factor in zip(sites, factors, strict=True):
        # The 1 at the end is what index -1 picks.
        padded = torch.cat([clamp_factor(factor), factor.new_ones(1)])

        for parameter in site.parameters:
            # One multiplier per row or column.
            multiplier = padded[parameter.index]
            if parameter.inverse:
                multiplier = 1 / multiplier

            # A parameter may take part in two sites: the second starts from the first one's result.
            value = changed.get(parameter.name, tensors[parameter.name])
            if value.ndim > 1 and parameter.axis == ROWS:
                multiplier = multiplier.unsqueeze(-1)
            if parameter.offset:
                changed[parameter.name] = (value + parameter.offset) * multiplier - parameter.offset
            else:
                changed[parameter.name] = value * multiplier
    return changed
