"""Dynamic per-token activation quantization.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284), weight-activation setting. Every token (and, for
queries, keys and values, every head of it) gets its own grid over the last axis; nothing is stored.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.config import FULL_BITS, SliderConfig
from sliderquant.method.quantizer import SMALLEST_SCALE, leading_columns, round_ste


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationFormat:
    """How activations are rounded.

    Attributes:
        bits: Bits per value, 2 to 8.
        sym: Signed grid around zero, the one servers run; asymmetric follows the paper.
        attention: Also round queries, keys and values after the rotary embedding.
        ratio: Share of leading features that is rounded, the intra-layer ratio, in (0, 1].
        exact_inputs: Layers whose inputs stay as they are, by names such as "layers.0.mlp.down_proj".
    """

    bits: int
    sym: bool
    attention: bool = False
    ratio: float = 1.0
    exact_inputs: frozenset[str] = frozenset()


def activation_format(config: SliderConfig) -> ActivationFormat | None:
    """Return how ``config`` rounds activations in the end; ``None`` if it does not."""
    if config.abits == FULL_BITS:
        return None
    return ActivationFormat(
        bits=config.abits, sym=config.act_sym, attention=config.quantize_attention
    )


def fake_quantize_tokens(x: Float[Tensor, "*tokens d"], fmt: ActivationFormat) -> Tensor:
    """Round activations to a grid of their own token and return them dequantized.

    Asymmetric: D = (max(x, 0) - min(x, 0)) / (2^b - 1), z = round(-min(x, 0) / D), codes less z from -z
    to 2^b - 1 - z. Symmetric: D = max|x| / ((2^b - 1) / 2), codes -2^(b-1) to 2^(b-1) - 1. The gradient
    passes the rounding, not the clamp.

    Args:
        x: Activations, floating point; the last axis is rounded together.
        fmt: Grid; with ``ratio`` below 1 only the leading ceil(d * ratio) features are replaced, by
            the grid of the whole token.

    Returns:
        Same shape and dtype.

    Example:
        >>> x = torch.tensor([[0.0, 0.4, 1.1, 3.0], [0.0, 4.0, 11.0, 30.0]])
        >>> fake_quantize_tokens(x, ActivationFormat(bits=2, sym=False))
        tensor([[ 0.,  0.,  1.,  3.],
                [ 0.,  0., 10., 30.]])
    """
    # In half precision x / D would lie on a grid of half codes before it is rounded.
    exact = x.to(torch.promote_types(x.dtype, torch.float32))

    # The range of a token always holds zero.
    low = exact.amin(dim=-1, keepdim=True).clamp(max=0)
    high = exact.amax(dim=-1, keepdim=True).clamp(min=0)
    intervals = 2**fmt.bits - 1
    if fmt.sym:
        scale = (high.maximum(-low) / (intervals / 2)).clamp(min=SMALLEST_SCALE)
        zero = torch.full_like(scale, 2 ** (fmt.bits - 1))
    else:
        scale = ((high - low) / intervals).clamp(min=SMALLEST_SCALE)
        zero = (-low / scale).round().detach()
    simulated = _limit_codes(round_ste(exact / scale), -zero, intervals - zero) * scale
    simulated = simulated.to(x.dtype)

    # An early stage of intra-layer sliding leaves the features at the end as they are.
    if fmt.ratio >= 1:
        return simulated
    leading = leading_columns(x.shape[-1], fmt.ratio, None)
    return torch.cat([simulated[..., :leading], x[..., leading:]], dim=-1)


def _limit_codes(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return codes within bounds, in one pass where no gradient is asked for."""
    if not codes.requires_grad:
        return codes.clamp(low, high)
    # Not clamp, whose gradient at the bounds depends on the release of torch.
    return torch.where(codes > high, high, torch.where(codes < low, low, codes))
