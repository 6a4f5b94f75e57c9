"""Multiplying a few rows by a packed weight without writing the weight out.

The reference is ``packed.packed_linear``. One program computes BLOCK_N outputs of all rows. It walks
along the inputs in tiles that lie in one group each, reads the packed words of a tile once, whatever the
number of rows, and the rows of x in contiguous pieces. Codes are small integers, exact in any floating
type, so tensor cores multiply them as they are; the group's scale and zero point, read once per tile,
come in behind the sum:

    y = sum over groups of D (sum_k (q_k - c) x_k - (z - c) sum_k x_k),    c = 2^(bits - 1)

Sums are in float32. The reference rounds every entry (q - z) D to the stored type before it multiplies.
Here it is not rounded, which changes a result by less than one rounding of it to the stored type.

Codes are a stream of bits (see ``packing``). After PERIOD codes they begin at a word again: 16 codes of
2 bits, 8 of 4 and 4 of 8 fill one word, 32 codes of 3 bits fill three. A tile holds whole periods; what
belongs to a neighbouring group in them meets a zero of x.

Decoding is bound by the bytes of the weight, which is why this pays for few rows only.
"""

# Triton's compile-time constants are integers in a kernel, and a type of their own to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

WORD_BITS = 32
ROWS = 8  # of x at most; above, dequantizing once and a large product are faster
SMALLEST_TILE, LARGEST_TILE = 32, 256  # codes of a row
STAGES = 5  # tiles that are on their way from memory, with the one that is computed
ALIGNMENT = 128  # codes; what the compiler may know about the beginning of a group


@triton.jit
def _codes(  # noqa: ANN202
    packed_ptr, n, n_ok, start, end, row_words,  # noqa: ANN001
    BITS: tl.constexpr, PERIOD: tl.constexpr, PERIODS: tl.constexpr,
):  # fmt: skip
    """Return the unsigned codes [BLOCK_N, PERIODS, PERIOD] from code ``start``; a word is read once."""
    period_words: tl.constexpr = PERIOD * BITS // 32
    period = tl.arange(0, PERIODS)
    address = packed_ptr + n[:, None].to(tl.int64) * row_words + start // PERIOD * period_words
    needed = n_ok[:, None] & (start + period * PERIOD < end)[None, :]
    first_bit = BITS * tl.arange(0, PERIOD)
    codes = tl.zeros((n.shape[0], PERIODS, PERIOD), dtype=tl.uint32)

    for j in tl.static_range(period_words):
        # Word j of every period. The last period of a row may lack some.
        word = period * period_words + j
        there = needed
        if period_words > 1:
            there = needed & (start // PERIOD * period_words + word < row_words)[None, :]
        words = tl.load(address + word[None, :], mask=there, other=0)
        words = words.to(tl.uint32, bitcast=True)[:, :, None]

        # The codes that begin in this word, and the rest of the one that began in the word before.
        if period_words == 1:
            codes = words >> first_bit.to(tl.uint32)[None, None, :]
        else:
            bit = (first_bit - 32 * j)[None, None, :]
            begun = words >> tl.maximum(bit, 0).to(tl.uint32)
            rest = words << tl.minimum(tl.maximum(-bit, 0), 31).to(tl.uint32)
            codes |= tl.where((bit >= 0) & (bit < 32), begun, 0)
            codes |= tl.where((bit < 0) & (bit > -BITS), rest, 0)
    return codes & ((1 << BITS) - 1)


@triton.jit
def _zero_points(  # noqa: ANN202
    zero_ptr, n, n_ok, group, groups, BITS: tl.constexpr  # noqa: ANN001
):  # fmt: skip
    """Return the unsigned zero points of outputs n in a group; they are packed along the outputs."""
    bit = n * BITS
    shift = (bit % 32).to(tl.uint32)
    address = zero_ptr + bit // 32 * groups + group
    zeros = tl.load(address, mask=n_ok, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        straddles = n_ok & (shift + BITS > 32)
        rest = tl.load(address + groups, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        zeros |= tl.where(straddles, rest << ((32 - shift) % 32), 0)
    return (zeros & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _kernel(  # noqa: ANN202
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr,  # noqa: ANN001
    rows, outputs, columns, row_words, groups, group_size, group_tiles,  # noqa: ANN001
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PERIOD: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # This program's outputs n, of all rows m.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n_ok = n < outputs
    middle: tl.constexpr = 1 << (BITS - 1)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    for tile in range(groups * group_tiles):
        # Codes of one group, from the beginning of a period on.
        group = tile // group_tiles
        first = tl.multiple_of(group * group_size, ALIGN)
        end = first + group_size
        start = first // PERIOD * PERIOD + tile % group_tiles * BLOCK_K
        codes = _codes(
            packed_ptr, n, n_ok, start, end, row_words, BITS, PERIOD, BLOCK_K // PERIOD
        )  # fmt: skip
        codes = tl.reshape(codes, (BLOCK_N, BLOCK_K)).to(tl.int32) - middle

        # Contiguous pieces of the rows of x, zero outside of the group.
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[None, :] * columns + k[:, None],
            mask=((k >= first) & (k < end))[:, None] & (m < rows)[None, :],
            other=0.0,
        )
        sums = tl.dot(codes.to(x.dtype), x, input_precision="ieee")

        # The group's zero points and scales.
        if HAS_ZERO:
            zeros = _zero_points(zero_ptr, n, n_ok, group, groups, BITS) - middle
            ones = tl.full((BLOCK_N, BLOCK_K), 1.0, x.dtype)
            sums -= zeros.to(tl.float32)[:, None] * tl.dot(ones, x, input_precision="ieee")
        scale = tl.load(scale_ptr + n * groups + group, mask=n_ok, other=0.0)
        total += scale.to(tl.float32)[:, None] * sums

    tl.store(
        out_ptr + m[None, :] * outputs + n[:, None],
        total.to(out_ptr.dtype.element_ty),
        mask=n_ok[:, None] & (m < rows)[None, :],
    )


def packed_gemv(
    x: Float[Tensor, "m in"],
    packed: Int[Tensor, "out w"],
    scale: Float[Tensor, "out groups"],
    zero: Int[Tensor, "z groups"] | None,
    bits: int,
    *,
    block_n: int = 16,
    block_k: int | None = None,
) -> Float[Tensor, "m out"]:
    """Return x ((q - z) D)^T in the dtype of ``x``.

    It is the operator ``torch.ops.sliderquant.packed_gemv``, so that ``torch.compile`` and fake tensors
    see one operation whose result has a known shape.

    Args:
        x: At most ``ROWS`` rows, in float16, bfloat16 or float32.
        packed: As ``packing.packed_tensors`` stores it.
        scale: D of every group.
        zero: Packed zero points, or ``None``.
        bits: Of a code, 2 to 8.
        block_n: Outputs of a program, a power of two, 16 or more.
        block_k: Codes of a row at a time, a power of two, 32 or more; default a group, 32 to 256.

    Raises:
        ValueError: If there are more rows.
    """
    if len(x) > ROWS:
        raise ValueError(f"x has {len(x)} rows, the kernel takes {ROWS}; use packed_linear")
    group_size = x.shape[1] // scale.shape[1]
    default = min(max(triton.next_power_of_2(group_size), SMALLEST_TILE), LARGEST_TILE)
    return _operator(x, packed, scale, zero, bits, block_n, block_k or default)


@torch.library.custom_op("sliderquant::packed_gemv", mutates_args=())
def _operator(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    rows, columns = x.shape
    outputs, groups = scale.shape
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out

    # A group that does not begin with a period is read from the beginning of that period on.
    period, group_size = WORD_BITS // (bits & -bits), columns // groups
    behind = 0 if group_size % period == 0 or groups == 1 else period - 1
    # Triton launches on the current card, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(outputs, block_n),)](
            x.contiguous(), packed, scale, scale if zero is None else zero, out,
            rows, outputs, columns, packed.shape[1], groups, group_size,
            triton.cdiv(group_size + behind, block_k),
            BITS=bits, HAS_ZERO=zero is not None, PERIOD=period,
            ALIGN=ALIGNMENT if groups == 1 else min(ALIGNMENT, group_size & -group_size),
            BLOCK_M=ROWS, BLOCK_N=block_n, BLOCK_K=block_k, num_stages=STAGES,
        )  # fmt: skip
    return out


@_operator.register_fake
def _shape_of_result(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])
