"""Round-to-nearest: the calibration-free baseline that every result is printed beside."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sliderquant.method.decoder import Decoder
from sliderquant.method.quantizer import WeightFormat, fake_quantize


def rtn_weights(
    decoder: Decoder, block: int, fmt: WeightFormat | Mapping[str, WeightFormat]
) -> dict[str, Tensor]:
    """Return the weights of one block rounded to their nearest grid point, without clipping.

    Args:
        decoder: The model.
        block: Number of the block.
        fmt: Storage format of all weights, or of those by name that are to be rounded.
    """
    weights = decoder.linear_weights(block)
    formats = dict.fromkeys(weights, fmt) if isinstance(fmt, WeightFormat) else fmt
    with torch.no_grad():
        return {name: fake_quantize(weights[name].float(), formats[name]) for name in formats}
