"""Uniform weight quantizers with learnable clipping.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284); the quantizer and its clipping follow OmniQuant, as
the authors' code does. Symbols: W weight [out, in], b bits, g columns per group, D scale, z zero point,
u and l clipping logits. Weights are seen as [out, groups, g]; a row with one scale is one group. Unlike
in the released code, the range always holds zero, so that every grid can be stored.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_SCALE = 1e-5  # keeps W / D finite for rows that are all zero
LARGEST_SCALE = 1e4
INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: clipping starts almost open
BYTE_BITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """How a weight is stored.

    Attributes:
        bits: Bits per code (b), 2 to 8.
        group_size: Input columns per scale (g); ``None`` for one scale per output row.
        sym: Signed codes without zero point.
        dtype: Type of the stored scale and of the dequantized weight. Codes are computed from the
            stored scale, so that what is simulated is what is stored.
        float16_digits: Binary digits of a scale that is stored in float16, 1 to 11, beside weights that
            are not rounded to float16; ``None`` for scales in ``dtype``.

    Example:
        >>> fmt = WeightFormat(bits=2, group_size=64, sym=False, dtype=torch.bfloat16)
        >>> fmt.code_range
        (0, 3)
        >>> fmt.bits_per_weight(columns=4096)
        2.28125
    """

    bits: int
    group_size: int | None
    sym: bool
    dtype: torch.dtype
    float16_digits: int | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type of the stored scale."""
        return self.dtype if self.float16_digits is None else torch.float16

    def columns_per_group(self, columns: int) -> int:
        """Return g for a weight with ``columns`` input columns."""
        return self.group_size or columns

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: [-2^(b-1), 2^(b-1) - 1] if symmetric, else [0, 2^b - 1]."""
        low = -(2 ** (self.bits - 1)) if self.sym else 0
        return low, low + 2**self.bits - 1

    def bits_per_weight(self, columns: int) -> float:
        """Return the stored bits per weight of a row of ``columns``: codes, scales, zero points."""
        bits_per_group = BYTE_BITS * self.scale_dtype.itemsize + (0 if self.sym else self.bits)
        return self.bits + bits_per_group / self.columns_per_group(columns)

    def mean_bits_per_weight(self, shapes: Collection[Sequence[int]]) -> float:
        """Return the stored bits per weight over several weights of these shapes, columns last."""
        stored = sum(math.prod(shape) * self.bits_per_weight(shape[-1]) for shape in shapes)
        return stored / sum(map(math.prod, shapes))


def straight_through(exact: Tensor, approximate: Tensor) -> Tensor:
    """Return ``approximate`` with the gradient of ``exact``."""
    return _StraightThrough.apply(exact, approximate.detach())


class _StraightThrough(torch.autograd.Function):
    """As exact + (approximate - exact), without two passes over the weight."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, approximate: Tensor) -> Tensor:
        return approximate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even; the gradient passes unchanged."""
    return straight_through(x, x.detach().round())


def simulate_storage(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` as it reads back after being stored in ``dtype``; the gradient passes."""
    return x if dtype == x.dtype else straight_through(x, x.detach().to(dtype).to(x.dtype))


def simulate_scale(scale: Tensor, fmt: WeightFormat) -> Tensor:
    """Return scales as they read back after being stored; the gradient passes.

    With ``float16_digits`` a scale keeps that many binary digits. The product with a zero point of
    11 - ``float16_digits`` binary digits, the minimum of a group, then is a float16 number, too.
    """
    if fmt.float16_digits is None:
        return simulate_storage(scale, fmt.dtype)
    mantissa, exponent = torch.frexp(scale.detach())  # mantissa in [0.5, 1)
    digits = torch.ldexp(mantissa, torch.tensor(fmt.float16_digits)).round()
    rounded = torch.ldexp(digits, exponent - fmt.float16_digits)
    return straight_through(scale, rounded.to(torch.float16).to(scale.dtype))


def quantization_grid(
    weight: Float[Tensor, "*out groups g"],
    fmt: WeightFormat,
    upper: Float[Tensor, "*out groups 1"] | None = None,
    lower: Float[Tensor, "*out groups 1"] | None = None,
) -> tuple[Float[Tensor, "*out groups 1"], Float[Tensor, "*out groups 1"]]:
    """Return scale and zero point of every group.

    The range is [s(l) min(W, 0), s(u) max(W, 0)] with s the sigmoid. Asymmetric:
    D = (hi - lo) / (2^b - 1), z = round(-lo / D). Symmetric: D = max(hi, -lo) / ((2^b - 1) / 2), z = 0.
    The scale is rounded to its stored type first and everything else follows from it.

    Args:
        weight: Weight in groups, floating point.
        fmt: Storage format.
        upper: Logits u of the upper clipping; ``None`` for no clipping.
        lower: Logits l of the lower clipping.

    Returns:
        D (gradient flows to ``weight``, ``upper`` and ``lower``) and z (no gradient), in the dtype of
        ``weight``.
    """
    # The clipped range always holds zero.
    high = weight.amax(dim=-1, keepdim=True).clamp(min=0)
    low = weight.amin(dim=-1, keepdim=True).clamp(max=0)
    if upper is not None:
        high = torch.sigmoid(upper) * high
    if lower is not None:
        low = torch.sigmoid(lower) * low

    # The scale spreads all codes over the range.
    intervals = 2**fmt.bits - 1
    scale = torch.maximum(high, -low) / (intervals / 2) if fmt.sym else (high - low) / intervals
    scale = simulate_scale(scale.clamp(SMALLEST_SCALE, LARGEST_SCALE), fmt)

    # The zero point is the code that stands for zero.
    if fmt.sym:
        return scale, torch.zeros_like(scale)
    return scale, (-low / scale).round().clamp(*fmt.code_range).detach()


def nearest_codes(
    weight: Float[Tensor, "*out groups g"],
    scale: Float[Tensor, "*out groups 1"],
    zero: Float[Tensor, "*out groups 1"],
    fmt: WeightFormat,
) -> Float[Tensor, "*out groups g"]:
    """Return q = clamp(round(W / D) + z), integers kept in floating point.

    The rounding passes the gradient on; a weight outside the grid gets none.
    """
    codes = round_ste(weight / scale)
    return _LimitedCodes.apply(codes if fmt.sym else codes + zero, *fmt.code_range)


class _LimitedCodes(torch.autograd.Function):
    """Codes within [low, high], where a code at a bound still has a gradient.

    Half of all 2-bit codes are at the bounds. The gradient of clamp is 1 there in some releases of torch
    and 0 in others.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, low: int, high: int) -> Tensor:
        limited = codes.clamp(low, high)
        ctx.save_for_backward(limited != codes)
        return limited

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (is_outside,) = ctx.saved_tensors
        return gradients[0].masked_fill(is_outside, 0), None, None


def fake_quantize(
    weight: Float[Tensor, "*experts out in"],
    fmt: WeightFormat,
    upper: Float[Tensor, "*experts out groups"] | None = None,
    lower: Float[Tensor, "*experts out groups"] | None = None,
    ratio: float = 1.0,
) -> Float[Tensor, "*experts out in"]:
    """Quantize and dequantize the leading part of every row: (q - z) D.

    Intra-layer sliding quantizes the leading ceil(in * ratio) columns, rounded up to whole groups; the
    other columns pass through. The grid always comes from whole groups, never from the selected part.

    Args:
        weight: Weight, floating point; ``in`` must be a multiple of the group size.
        fmt: Storage format.
        upper: Upper clipping logits, one per row and group.
        lower: Lower clipping logits.
        ratio: Share of quantized columns, in (0, 1].

    Returns:
        The simulated weight, same shape and dtype.

    Raises:
        ValueError: If ``in`` is no multiple of the group size.

    Example:
        >>> fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
        >>> fake_quantize(torch.tensor([[0.0, 0.4, 1.1, 3.0]]), fmt)
        tensor([[0., 0., 1., 3.]])
    """
    grouped, scale, zero = _group_weight(weight, fmt, upper, lower)
    codes = nearest_codes(grouped, scale, zero, fmt)
    values = (codes if fmt.sym else codes - zero) * scale
    simulated = simulate_storage(values, fmt.dtype).flatten(-2)
    if ratio >= 1:
        return simulated
    leading = leading_columns(weight.shape[-1], ratio, fmt.group_size)
    return torch.cat([simulated[..., :leading], weight[..., leading:]], dim=-1)


def _group_weight(
    weight: Tensor, fmt: WeightFormat, upper: Tensor | None, lower: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight in groups [*experts, out, groups, g], its scale and its zero point."""
    columns = weight.shape[-1]
    group_size = fmt.columns_per_group(columns)
    if columns % group_size:
        raise ValueError(
            f"{columns} input columns do not divide into groups of {group_size}; "
            "choose a group size that divides them"
        )
    grouped = weight.unflatten(-1, (columns // group_size, group_size))
    scale, zero = quantization_grid(
        grouped,
        fmt,
        None if upper is None else upper.unsqueeze(-1),
        None if lower is None else lower.unsqueeze(-1),
    )
    return grouped, scale, zero


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as it is stored: integers and their grid.

    Attributes:
        codes: q, int16, within ``fmt.code_range``.
        scale: D in ``fmt.scale_dtype``.
        zero: z, int16, within ``fmt.code_range``; ``None`` for symmetric formats.
        fmt: Storage format.
    """

    codes: Int[Tensor, "*experts out in"]
    scale: Float[Tensor, "*experts out groups"]
    zero: Int[Tensor, "*experts out groups"] | None
    fmt: WeightFormat

    def levels(self) -> Int[Tensor, "*experts out groups g"]:
        """Return q - z by group."""
        groups = self.scale.shape[-1]
        levels = self.codes.unflatten(-1, (groups, self.codes.shape[-1] // groups))
        return levels if self.zero is None else levels - self.zero.unsqueeze(-1)

    def dequantize(self) -> Float[Tensor, "*experts out in"]:
        """Return (q - z) D in ``fmt.dtype``: the values of ``fake_quantize``, bit for bit."""
        values = self.levels().float() * self.scale.float().unsqueeze(-1)
        return values.to(self.fmt.dtype).flatten(-2)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same weight on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedWeight(
            codes=self.codes.to(device), scale=self.scale.to(device), zero=zero, fmt=self.fmt
        )

    def __getitem__(self, index: int | slice) -> "QuantizedWeight":
        """Return one expert, or a range along the first axis (experts, or rows)."""
        zero = None if self.zero is None else self.zero[index]
        return QuantizedWeight(
            codes=self.codes[index], scale=self.scale[index], zero=zero, fmt=self.fmt
        )


def rescale(
    weight: QuantizedWeight, scale: Float[Tensor, "*experts out groups"]
) -> Float[Tensor, "*experts out in"]:
    """Return (q - z) D with another D, in float32; the gradient reaches D.

    Nothing of the weight's size is kept for the backward pass, only the codes that are there anyway.
    """
    return _Rescaled.apply(weight, scale.float()).flatten(-2)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: QuantizedWeight, scale: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.levels().float() * scale.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, (gradients[0] * ctx.weight.levels()).sum(dim=-1)


@torch.no_grad()
def quantize_weight(
    weight: Float[Tensor, "*experts out in"],
    fmt: WeightFormat,
    upper: Float[Tensor, "*experts out groups"] | None = None,
    lower: Float[Tensor, "*experts out groups"] | None = None,
) -> QuantizedWeight:
    """Return the integers and the grid that ``fake_quantize`` simulates.

    Args:
        weight: Weight, in the type in which it was simulated (float32).
        fmt: Storage format.
        upper: Upper clipping logits.
        lower: Lower clipping logits.

    Raises:
        ValueError: If ``in`` is no multiple of the group size.

    Example:
        >>> fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
        >>> stored = quantize_weight(torch.tensor([[-1.0, 0.4, 1.1, 2.0]]), fmt)
        >>> stored.codes, stored.scale, stored.zero
        (tensor([[0, 1, 2, 3]], dtype=torch.int16), tensor([[1.]]), tensor([[1]], dtype=torch.int16))
    """
    grouped, scale, zero = _group_weight(weight, fmt, upper, lower)
    return QuantizedWeight(
        codes=nearest_codes(grouped, scale, zero, fmt).flatten(-2).to(torch.int16),
        scale=scale.squeeze(-1).to(fmt.scale_dtype),
        zero=None if fmt.sym else zero.squeeze(-1).to(torch.int16),
        fmt=fmt,
    )


def leading_columns(columns: int, ratio: float, group_size: int | None) -> int:
    """Return how many leading columns a stage quantizes: ceil(columns * ratio), in whole groups."""
    group_size = group_size or 1
    # The small slack keeps 0.3 * 10 = 3.0000000000000004 from becoming 4 columns.
    quantized = math.ceil(columns * ratio - 1e-9)
    return min(columns, math.ceil(quantized / group_size) * group_size)
