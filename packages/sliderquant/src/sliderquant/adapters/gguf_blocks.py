"""Quantized weights as the blocks of llama.cpp: Q4_0, Q4_1 and Q8_0.

A block holds 32 neighbouring weights of a row. With d a float16 scale, m a float16 minimum and u or q
the code of a weight, its value in float32 is

    Q4_0: (u - 8) d, 18 bytes     Q4_1: u d + m, 20 bytes     Q8_0: q d, 34 bytes

Codes of 4 bits lie two in a byte: the first half of a block in the low nibbles, the second half in the
high ones. Source: the formats' reference in ``gguf/quants.py`` of llama.cpp.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from effml_common.errors import InputError
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat

BLOCK = 32  # weights of a block
Q4_0, Q4_1, Q8_0 = "Q4_0", "Q4_1", "Q8_0"
BLOCK_BYTES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufWeight:
    """A weight as a GGUF file holds it.

    Attributes:
        kind: "Q4_0", "Q4_1" or "Q8_0".
        blocks: Its blocks, row by row.
        values: What the blocks stand for.
    """

    kind: str
    blocks: UInt8[Tensor, "out bytes"]
    values: Float[Tensor, "out in"]


def gguf_kind(fmt: WeightFormat, columns: int) -> str:
    """Return the kind of block that holds a weight's codes as they are.

    Raises:
        InputError: If none does.
    """
    group = fmt.columns_per_group(columns)
    if group % BLOCK:
        raise InputError(
            f"groups of {group} columns do not consist of llama.cpp's blocks of {BLOCK}; quantize with "
            f"--group-size {BLOCK} or a multiple of it"
        )
    if fmt.bits <= 4:
        return Q4_0 if fmt.sym else Q4_1
    if not fmt.sym:
        raise InputError(
            f"GGUF has no exact place for asymmetric codes of {fmt.bits} bits; quantize with --sym, "
            "or to 4 bits or fewer"
        )
    return Q8_0


def gguf_weight(weight: QuantizedWeight) -> GgufWeight:
    """Return a weight [out, in] in blocks, with the same codes; scales and minima become float16.

    Raises:
        InputError: If no kind of block holds it, or a scale is beyond float16.
    """
    # A block has a scale of its own, where a group has one for several blocks.
    kind = gguf_kind(weight.fmt, weight.codes.shape[-1])
    rows, columns = weight.codes.shape
    repeats = columns // BLOCK // weight.scale.shape[-1]
    exact_scale = weight.scale.float().repeat_interleave(repeats, dim=-1)
    scale = _float16(exact_scale)
    codes = weight.codes.view(rows, -1, BLOCK)

    # Bytes of each block, in the order of the file.
    if kind == Q8_0:
        parts = [_bytes(scale), codes.to(torch.int8).view(torch.uint8)]
        values = codes * scale.float().unsqueeze(-1)
    elif kind == Q4_0:
        parts = [_bytes(scale), _nibbles(codes + 8)]
        values = codes * scale.float().unsqueeze(-1)
    else:
        assert weight.zero is not None
        zero = weight.zero.float().repeat_interleave(repeats, dim=-1)
        minimum = _float16(-zero * exact_scale)
        parts = [_bytes(scale), _bytes(minimum), _nibbles(codes)]
        values = codes * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)
    return GgufWeight(
        kind=kind, blocks=torch.cat(parts, dim=-1).flatten(1), values=values.flatten(1)
    )


def _float16(numbers: Tensor) -> Tensor:
    rounded = numbers.to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise InputError(
            f"a scale of {numbers.abs().max():.3g} is beyond float16, which GGUF stores; "
            "serve this model in another format"
        )
    return rounded


def _bytes(numbers: Tensor) -> Tensor:
    """Return the bytes of one float16 number per block, [..., 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Return two codes of a block in each byte, [..., 16]."""
    first, second = codes.to(torch.uint8).split(BLOCK // 2, dim=-1)
    return first | second << 4
