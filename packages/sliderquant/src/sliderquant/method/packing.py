"""Codes as a dense stream of bits in 32-bit words, and the tensors a quantized weight is stored as.

Layout, the one of compressed-tensors ("pack-quantized"), for b bits: codes are unsigned,
u = q - min(code_range), so that symmetric and asymmetric weights pack alike. Code k of a row occupies
bits [k b, (k + 1) b) of that row, counted from the lowest bit of its first int32 word; a code may
straddle two words; the last word ends in zeros. 16 codes of 2 bits fill a word, 32 codes of 3 bits
three. Zero points are packed the same way, along the rows of the weight instead of its columns.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sliderquant.method.quantizer import QuantizedWeight, WeightFormat

WORD = 32
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def words(count: int, bits: int) -> int:
    """Return how many 32-bit words hold ``count`` codes of ``bits`` bits."""
    return -(-count * bits // WORD)


def pack_bits(codes: Int[Tensor, "*rows n"], bits: int) -> Int[Tensor, "*rows w"]:
    """Pack unsigned codes along the last axis.

    Args:
        codes: Integers in [0, 2^b - 1].
        bits: b, 1 to 16.

    Returns:
        int32, ``words(n, bits)`` per row.
    """
    count = codes.shape[-1]
    period = WORD // _gcd(bits)  # codes after which the pattern of words repeats
    padded = torch.nn.functional.pad(codes, (0, -count % period)).unflatten(-1, (-1, period))
    made = codes.new_zeros((*padded.shape[:-1], period * bits // WORD), dtype=torch.int64)
    for k in range(period):
        word, offset = divmod(k * bits, WORD)
        shifted = padded[..., k].long() << offset
        made[..., word] |= shifted & 0xFFFFFFFF
        if offset + bits > WORD:
            made[..., word + 1] |= shifted >> WORD
    # The 33rd bit and above are gone; values from 2^31 on wrap to negative int32.
    return made.flatten(-2)[..., : words(count, bits)].to(torch.int32)


def unpack_bits(packed: Int[Tensor, "*rows w"], bits: int, count: int) -> Int[Tensor, "*rows n"]:
    """Return the first ``count`` unsigned codes of every row, int16: the inverse of ``pack_bits``."""
    mask = 2**bits - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
        # The shift repeats the sign bit; the mask takes it away again.
        made = (packed.unsqueeze(-1) >> shifts) & mask
    else:
        period = WORD // _gcd(bits)
        per_period = period * bits // WORD
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % per_period + 1))
        low = padded.long() & 0xFFFFFFFF
        # Every word with its successor behind it, so that no code straddles.
        pairs = (low[..., :-1] | low[..., 1:] << WORD).unflatten(-1, (-1, per_period))
        start = torch.arange(period, device=packed.device) * bits
        made = (pairs[..., start // WORD] >> start % WORD) & mask
    return made.flatten(-2)[..., :count].to(torch.int16)


def _gcd(bits: int) -> int:
    """Greatest common divisor of ``bits`` and the word size, a power of two."""
    return bits & -bits if bits < WORD else WORD


def packed_tensors(weight: QuantizedWeight) -> dict[str, Shaped[Tensor, "..."]]:
    """Return what is stored of a weight [out, in], by suffix of the layer's name.

    ``weight_packed`` int32 [out, words(in)], ``weight_scale`` [out, groups] in the format's dtype,
    ``weight_shape`` int64 [2], and for asymmetric formats ``weight_zero_point`` int32
    [words(out), groups]. Experts that are stored together keep their leading axis.
    """
    low, _ = weight.fmt.code_range
    tensors = {
        PACKED: pack_bits(weight.codes - low, weight.fmt.bits),
        SCALE: weight.step,
        SHAPE: torch.tensor(weight.codes.shape),
    }
    if weight.zero is not None:
        tensors[ZERO] = pack_bits(weight.zero.mT - low, weight.fmt.bits).mT.contiguous()
    return tensors


def unpacked_weight(
    packed: Int[Tensor, "*experts out w"],
    scale: Float[Tensor, "*experts out groups"],
    zero: Int[Tensor, "*experts z groups"] | None,
    columns: int,
    fmt: WeightFormat,
) -> QuantizedWeight:
    """Return the weight that ``packed_tensors`` stored."""
    low, _ = fmt.code_range
    return QuantizedWeight(
        codes=unpack_bits(packed, fmt.bits, columns) + low,
        step=scale,
        zero=None if zero is None else unpack_bits(zero.mT, fmt.bits, scale.shape[-2]).mT + low,
        fmt=fmt,
    )
