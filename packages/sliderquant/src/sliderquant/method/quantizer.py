"""Uniform weight quantizers with learnable clipping.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284); the quantizer and its clipping follow OmniQuant, as
the authors' code does. Symbols: W weight [out, in], b bits, g columns per group, D step (scale), z zero
point, u and l clipping logits. Weights are seen as [out, groups, g]; per-row scales are one group.
Unlike the released code, the range always holds zero, so that every grid can be stored.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

STEP_FLOOR = 1e-5  # keeps W / D finite for rows that are all zero
STEP_CEILING = 1e4
LOGIT_INIT = 4.0  # sigmoid(4) = 0.982: clipping starts almost open


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """How a weight is stored.

    Attributes:
        bits: Bits per code (b), 2 to 8.
        group_size: Input columns per scale (g); ``None`` for one scale per output row.
        sym: Signed codes without zero point.
        dtype: Type of the stored step and of the dequantized weight; codes are computed from the
            stored step, so that what is simulated is what is stored.
    """

    bits: int
    group_size: int | None
    sym: bool
    dtype: torch.dtype

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
        side = 8 * self.dtype.itemsize + (0 if self.sym else self.bits)
        return self.bits + side / self.columns_per_group(columns)


def straight_through(exact: Tensor, approximate: Tensor) -> Tensor:
    """Return ``approximate`` with the gradient of ``exact``."""
    return exact + (approximate - exact).detach()


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even; the gradient passes unchanged."""
    return straight_through(x, x.round())


def stored(x: Tensor, fmt: WeightFormat) -> Tensor:
    """Return ``x`` as it reads back after being stored in ``fmt.dtype``; the gradient passes."""
    return x if fmt.dtype == x.dtype else straight_through(x, x.to(fmt.dtype).to(x.dtype))


def quantization_grid(
    weight: Float[Tensor, "*out groups g"],
    fmt: WeightFormat,
    upper: Float[Tensor, "*out groups 1"] | None = None,
    lower: Float[Tensor, "*out groups 1"] | None = None,
) -> tuple[Float[Tensor, "*out groups 1"], Float[Tensor, "*out groups 1"]]:
    """Return step and zero point of every group.

    The range is [s(l) min(W, 0), s(u) max(W, 0)] with s the sigmoid. Asymmetric:
    D = (hi - lo) / (2^b - 1), z = round(-lo / D). Symmetric: D = max(hi, -lo) / ((2^b - 1) / 2), z = 0.
    The step is rounded to its stored type first and everything else follows from it.

    Args:
        weight: Weight in groups, floating point.
        fmt: Storage format.
        upper: Logits u of the upper clipping; ``None`` for no clipping.
        lower: Logits l of the lower clipping.

    Returns:
        D (gradient flows to ``weight``, ``upper`` and ``lower``) and z (no gradient), in the dtype of
        ``weight``.
    """
    high = weight.amax(dim=-1, keepdim=True).clamp(min=0)
    low = weight.amin(dim=-1, keepdim=True).clamp(max=0)
    if upper is not None:
        high = torch.sigmoid(upper) * high
    if lower is not None:
        low = torch.sigmoid(lower) * low
    levels = 2**fmt.bits - 1
    step = torch.maximum(high, -low) / (levels / 2) if fmt.sym else (high - low) / levels
    step = step.clamp(STEP_FLOOR, STEP_CEILING)
    step = stored(step, fmt)
    if fmt.sym:
        return step, torch.zeros_like(step)
    return step, (-low / step).round().clamp(*fmt.code_range).detach()


def codes(
    weight: Float[Tensor, "*out groups g"],
    step: Float[Tensor, "*out groups 1"],
    zero: Float[Tensor, "*out groups 1"],
    fmt: WeightFormat,
) -> Float[Tensor, "*out groups g"]:
    """Return q = clamp(round(W / D) + z), integers kept in floating point.

    The rounding passes the gradient on; a weight outside the grid gets none.
    """
    low, high = fmt.code_range
    code = round_ste(weight / step) + zero
    # Not clamp: its gradient at the bounds, where half of all 2-bit codes are, is 1 in some releases
    # of torch and 0 in others.
    return torch.where(code > high, high, torch.where(code < low, low, code))


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
    """
    grouped, step, zero = _grouped_grid(weight, fmt, upper, lower)
    simulated = stored((codes(grouped, step, zero, fmt) - zero) * step, fmt).flatten(-2)
    if ratio >= 1:
        return simulated
    leading = leading_columns(weight.shape[-1], ratio, fmt.group_size)
    return torch.cat([simulated[..., :leading], weight[..., leading:]], dim=-1)


def _grouped_grid(
    weight: Tensor, fmt: WeightFormat, upper: Tensor | None, lower: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight in groups [*experts, out, groups, g], its step and its zero point."""
    columns = weight.shape[-1]
    size = fmt.columns_per_group(columns)
    if columns % size:
        raise ValueError(f"{columns} input columns do not divide into groups of {size}")
    grouped = weight.unflatten(-1, (columns // size, size))
    step, zero = quantization_grid(
        grouped,
        fmt,
        None if upper is None else upper.unsqueeze(-1),
        None if lower is None else lower.unsqueeze(-1),
    )
    return grouped, step, zero


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as it is stored: integers and their grid.

    Attributes:
        codes: q, int16, within ``fmt.code_range``.
        step: D in ``fmt.dtype``.
        zero: z, int16, within ``fmt.code_range``; ``None`` for symmetric formats.
        fmt: Storage format.
    """

    codes: Int[Tensor, "*experts out in"]
    step: Float[Tensor, "*experts out groups"]
    zero: Int[Tensor, "*experts out groups"] | None
    fmt: WeightFormat

    def dequantize(self) -> Float[Tensor, "*experts out in"]:
        """Return (q - z) D in ``fmt.dtype``: the values of ``fake_quantize``, bit for bit."""
        groups = self.step.shape[-1]
        codes = self.codes.unflatten(-1, (groups, self.codes.shape[-1] // groups))
        if self.zero is not None:
            codes = codes - self.zero.unsqueeze(-1)
        return (codes.float() * self.step.float().unsqueeze(-1)).to(self.fmt.dtype).flatten(-2)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same weight on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantizedWeight(
            codes=self.codes.to(device), step=self.step.to(device), zero=zero, fmt=self.fmt
        )

    def __getitem__(self, index: int | slice) -> "QuantizedWeight":
        """Return one expert, or a range along the first axis (experts, or rows)."""
        zero = None if self.zero is None else self.zero[index]
        return QuantizedWeight(
            codes=self.codes[index], step=self.step[index], zero=zero, fmt=self.fmt
        )


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
    """
    grouped, step, zero = _grouped_grid(weight, fmt, upper, lower)
    return QuantizedWeight(
        codes=codes(grouped, step, zero, fmt).flatten(-2).to(torch.int16),
        step=step.squeeze(-1).to(fmt.dtype),
        zero=None if fmt.sym else zero.squeeze(-1).to(torch.int16),
        fmt=fmt,
    )


def leading_columns(columns: int, ratio: float, group_size: int | None) -> int:
    """Return how many leading columns a stage quantizes: ceil(columns * ratio), in whole groups."""
    size = group_size or 1
    # The small slack keeps 0.3 * 10 = 3.0000000000000004 from becoming 4 columns.
    wanted = math.ceil(columns * ratio - 1e-9)
    return min(columns, math.ceil(wanted / size) * size)
