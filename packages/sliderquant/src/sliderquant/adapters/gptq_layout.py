"""The layout of GPTQ checkpoints, which vLLM and many other programs read.

For b bits a layer holds ``qweight`` int32 [in b / 32, out], codes packed along the input,
``qzeros`` int32 [groups, out b / 32], ``scales`` float16 [groups, out] and ``g_idx`` int32 [in],
the group of each column. Codes and zero points are unsigned. Symmetric weights have the zero point
2^(b-1); the first version of the layout ("gptq") stores it minus one, the second ("gptq_v2") as it
is. Source: AutoGPTQ and GPTQModel.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from effml_common.errors import ConfigError, InputError
from sliderquant.adapters.families import DOWN_EXPERTS, GATE_UP_EXPERTS
from sliderquant.method.packing import WORD_BITS, pack_bits
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat

GPTQ_BITS = (2, 4, 8)  # codes that fill whole words


def check_gptq(weights: Mapping[str, WeightFormat], names: Collection[str]) -> None:
    """Refuse formats that the layout does not have.

    Args:
        weights: Formats of the quantized parameters, by their full names.
        names: Full names of all parameters; each linear layer of a block has to be quantized.

    Raises:
        ConfigError: Naming what can be done instead.
    """
    experts = [name for name in names if name.endswith((GATE_UP_EXPERTS, DOWN_EXPERTS))]
    if experts:
        raise ConfigError(
            f"the gptq layout has no place for fused experts such as {experts[0]}; export the model to "
            "compressed-tensors"
        )
    formats, linears = list(weights.values()), sum(n.endswith("_proj.weight") for n in names)
    if len({(fmt.bits, fmt.group_size, fmt.sym) for fmt in formats}) != 1 or len(formats) < linears:
        raise ConfigError(
            "the gptq layout has one format for all layers, and this model has several or leaves some "
            "as they are; export it to compressed-tensors"
        )
    if formats[0].bits not in GPTQ_BITS:
        raise ConfigError(
            f"the gptq layout is written for 2, 4 and 8 bits, and this model has {formats[0].bits}; "
            "export it to compressed-tensors"
        )


def gptq_config(fmt: WeightFormat) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model in this layout."""
    return {
        "quant_method": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group_size or -1,
        "sym": fmt.sym,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if fmt.sym else "gptq_v2",
    }


def gptq_tensors(weight: QuantizedWeight, name: str) -> dict[str, Shaped[Tensor, "..."]]:
    """Return what is stored of a weight [out, in], by suffix of the layer's name.

    Raises:
        InputError: If float16 does not hold a scale as it is, or codes do not fill words.
    """
    fmt, (low, _) = weight.fmt, weight.fmt.code_range
    rows, columns = weight.codes.shape
    if rows * fmt.bits % WORD_BITS or columns * fmt.bits % WORD_BITS:
        raise InputError(
            f"{name} is {rows} x {columns}, which {fmt.bits}-bit codes do not fill into whole words of "
            "the gptq layout; export it to compressed-tensors"
        )
    scales = weight.scale.T.to(torch.float16).contiguous()
    if not torch.equal(scales.T.to(weight.scale.dtype), weight.scale):
        raise InputError(
            f"{name} has scales that float16 does not hold, and the gptq layout stores float16; "
            "quantize the model in bfloat16 or with --for gguf, or export it to compressed-tensors"
        )

    # Symmetric codes are moved up to be unsigned, and zero with them.
    zero = torch.full_like(weight.scale, -low, dtype=torch.int16)
    zero = zero - 1 if weight.zero is None else weight.zero
    groups = weight.scale.shape[-1]
    return {
        "qweight": pack_bits(weight.codes - low, fmt.bits).T.contiguous(),
        "qzeros": pack_bits(zero.T, fmt.bits),
        "scales": scales,
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(columns // groups),
    }
