"""Codes as a dense stream of bits in 32-bit words, and the tensors a quantized weight is stored as.

Layout, the one of compressed-tensors ("pack-quantized"), for b bits: codes are unsigned,
u = q - min(code_range), so that symmetric and asymmetric weights pack alike. Code k of a row occupies
bits [k b, (k + 1) b) of that row, counted from the lowest bit of its first int32 word; a code may
straddle two words; the last word ends in zeros. 16 codes of 2 bits fill a word, 32 codes of 3 bits
three. Zero points are packed the same way, along the rows of the weight instead of its columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sliderquant.method.quantizer import QuantizedWeight, WeightFormat

WORD_BITS = 32
# Suffixes of the stored tensors, those of compressed-tensors.
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


def words(count: int, bits: int) -> int:
    """Return how many 32-bit words hold ``count`` codes of ``bits`` bits."""
    return -(-count * bits // WORD_BITS)


def pack_bits(codes: Int[Tensor, "*rows n"], bits: int) -> Int[Tensor, "*rows w"]:
    """Pack unsigned codes along the last axis.

    Args:
        codes: Integers in [0, 2^b - 1].
        bits: b, 1 to 16.

    Returns:
        int32, ``words(n, bits)`` per row.

    Example:
        >>> pack_bits(torch.tensor([[3, 0, 2, 1]]), bits=2)  # 3 + 0 * 4 + 2 * 16 + 1 * 64
        tensor([[99]], dtype=torch.int32)
    """
    # The pattern of codes and words repeats after so many codes.
    count = codes.shape[-1]
    period = WORD_BITS // _gcd(bits)
    padded = torch.nn.functional.pad(codes, (0, -count % period)).unflatten(-1, (-1, period))
    packed = codes.new_zeros((*padded.shape[:-1], period * bits // WORD_BITS), dtype=torch.int64)

    # Each code of the period goes to its place in its word, and where it straddles, in the next one.
    for k in range(period):
        word, offset = divmod(k * bits, WORD_BITS)
        shifted = padded[..., k].long() << offset
        packed[..., word] |= shifted & 0xFFFFFFFF
        if offset + bits > WORD_BITS:
            packed[..., word + 1] |= shifted >> WORD_BITS

    # The 33rd bit and above are gone; values from 2^31 on wrap to negative int32.
    return packed.flatten(-2)[..., : words(count, bits)].to(torch.int32)


def unpack_bits(packed: Int[Tensor, "*rows w"], bits: int, count: int) -> Int[Tensor, "*rows n"]:
    """Return the first ``count`` unsigned codes of every row, int16: the inverse of ``pack_bits``."""
    mask = 2**bits - 1
    if WORD_BITS % bits == 0:
        # Every word holds whole codes. The shift repeats the sign bit; the mask takes it away again.
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts) & mask
    else:
        # Every word with its successor behind it, so that no code straddles.
        period = WORD_BITS // _gcd(bits)
        words_per_period = period * bits // WORD_BITS
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % words_per_period + 1))
        unsigned = padded.long() & 0xFFFFFFFF
        pairs = unsigned[..., :-1] | unsigned[..., 1:] << WORD_BITS
        pairs = pairs.unflatten(-1, (-1, words_per_period))

        start = torch.arange(period, device=packed.device) * bits
        codes = (pairs[..., start // WORD_BITS] >> start % WORD_BITS) & mask
    return codes.flatten(-2)[..., :count].to(torch.int16)


def _gcd(bits: int) -> int:
    """Greatest common divisor of ``bits`` and the word size, a power of two."""
    return bits & -bits if bits < WORD_BITS else WORD_BITS


def packed_tensors(weight: QuantizedWeight) -> dict[str, Shaped[Tensor, "..."]]:
    """Return what is stored of a weight [out, in], by suffix of the layer's name.

    ``weight_packed`` int32 [out, words(in)], ``weight_scale`` [out, groups] in the format's scale_dtype,
    ``weight_shape`` int64 [2], and for asymmetric formats ``weight_zero_point`` int32
    [words(out), groups]. Experts that are stored together keep their leading axis.
    """
    low, _ = weight.fmt.code_range
    tensors = {
        PACKED: pack_bits(weight.codes - low, weight.fmt.bits),
        SCALE: weight.scale,
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
        scale=scale,
        zero=None if zero is None else unpack_bits(zero.mT, fmt.bits, scale.shape[-2]).mT + low,
        fmt=fmt,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedCodes:
    """A weight whose codes wait in as many bits as they have, in main memory.

    Attributes:
        tensors: As ``packed_tensors`` returns them, on the CPU.
        columns: Input columns of the weight.
        fmt: Storage format.
    """

    tensors: dict[str, Shaped[Tensor, "..."]]
    columns: int
    fmt: WeightFormat

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "PackedCodes":
        """Pack a weight where it is, and keep the result on the CPU."""
        tensors = {name: tensor.to("cpu") for name, tensor in packed_tensors(weight).items()}
        return cls(tensors=tensors, columns=weight.codes.shape[-1], fmt=weight.fmt)

    def unpack(self, device: torch.device | str = "cpu") -> QuantizedWeight:
        """Return the weight on a device."""
        on_device = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return unpacked_weight(
            on_device[PACKED], on_device[SCALE], on_device.get(ZERO), self.columns, self.fmt
        )
