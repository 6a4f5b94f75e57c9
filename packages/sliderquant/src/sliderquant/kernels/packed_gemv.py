"""Multiplying a few rows by a packed weight without writing the weight out.

The reference is ``packed.packed_linear``. One program computes BLOCK_N outputs of one row: it reads the
words of the weight's rows once, takes the codes out by shifts, and sums in float32. Every dequantized
entry is rounded to the stored type first, so that only the order of the sum differs from the reference.

Words must hold whole codes: 2, 4 and 8 bits. Decoding is bound by the bytes of the weight, which is why
this pays for few rows only.
"""

# Triton's compile-time constants are integers in a kernel, and a type of their own to a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BITS = (2, 4, 8)  # of a code, so that words hold whole codes
ROWS = 8  # of x; above, dequantizing once and a large product are faster


@triton.jit
def _kernel(  # noqa: ANN202
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr,  # noqa: ANN001
    outputs, columns, row_words, groups, group_size,  # noqa: ANN001
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = (1 << BITS) - 1

    # This program's row of x, and its outputs n.
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < outputs
    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)

    for start in range(0, row_words, BLOCK_W):
        # Words of the weight's rows, each read once.
        w = start + tl.arange(0, BLOCK_W)
        inside = n_ok[:, None] & (w < row_words)[None, :]
        address = n[:, None].to(tl.int64) * row_words + w[None, :]
        packed = tl.load(packed_ptr + address, mask=inside, other=0)

        for i in tl.static_range(per_word):
            # Code i of every word belongs to input k and its group.
            k = w * per_word + i
            ok = k < columns
            x = tl.load(x_ptr + row * columns + k, mask=ok, other=0.0).to(tl.float32)
            group = tl.minimum(k // group_size, groups - 1)
            scale = tl.load(
                scale_ptr + n[:, None] * groups + group[None, :],
                mask=n_ok[:, None] & ok[None, :],
                other=0.0,
            )
            code = (packed >> (BITS * i)) & mask
            if HAS_ZERO:
                zeros = tl.load(
                    zero_ptr + (n // per_word)[:, None] * groups + group[None, :],
                    mask=n_ok[:, None] & ok[None, :],
                    other=0,
                )
                zero = (zeros >> (BITS * (n % per_word))[:, None]) & mask
            else:
                zero = 1 << (BITS - 1)

            # Rounded to the stored type, as the reference dequantizes.
            weight = (code - zero).to(tl.float32) * scale.to(tl.float32)
            total += weight.to(scale_ptr.dtype.element_ty).to(tl.float32) * x[None, :]

    result = tl.sum(total, axis=1)
    tl.store(out_ptr + row * outputs + n, result.to(out_ptr.dtype.element_ty), mask=n_ok)


def packed_gemv(
    x: Float[Tensor, "m in"],
    packed: Int[Tensor, "out w"],
    scale: Float[Tensor, "out groups"],
    zero: Int[Tensor, "z groups"] | None,
    bits: int,
    *,
    block_n: int = 16,
    block_w: int = 64,
) -> Float[Tensor, "m out"]:
    """Return x ((q - z) D)^T in the dtype of ``x``.

    It is the operator ``torch.ops.sliderquant.packed_gemv``, so that ``torch.compile`` and fake tensors
    see one operation whose result has a known shape.

    Args:
        x: Few rows.
        packed: As ``packing.packed_tensors`` stores it.
        scale: D of every group.
        zero: Packed zero points, or ``None``.
        bits: 2, 4 or 8.
        block_n: Outputs of a program, a power of two.
        block_w: Words of a row at a time, a power of two.

    Raises:
        ValueError: If codes of ``bits`` bits straddle words.
    """
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits straddle words; use packed_linear")
    return _operator(x, packed, scale, zero, bits, block_n, block_w)


@torch.library.custom_op("sliderquant::packed_gemv", mutates_args=())
def _operator(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    block_n: int,
    block_w: int,
) -> Tensor:
    rows, columns = x.shape
    outputs, groups = scale.shape
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(outputs, block_n), rows)
    # Triton launches on the current card, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        _kernel[grid](
            x.contiguous(), packed, scale, scale if zero is None else zero, out,
            outputs, columns, packed.shape[1], groups, columns // groups,
            BITS=bits, HAS_ZERO=zero is not None, BLOCK_N=block_n, BLOCK_W=block_w,
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
    block_w: int,
) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])
