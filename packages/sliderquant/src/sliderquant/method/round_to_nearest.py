"""Round-to-nearest: the calibration-free baseline that every result is printed beside."""

import torch
from torch import Tensor

from sliderquant.method.decoder import Decoder
from sliderquant.method.quantizer import WeightFormat, fake_quantize


def rtn_weights(decoder: Decoder, block: int, fmt: WeightFormat) -> dict[str, Tensor]:
    """Return the weights of one block rounded to their nearest grid point, without clipping."""
    with torch.no_grad():
        return {
            name: fake_quantize(weight.float(), fmt)
            for name, weight in decoder.linear_weights(block).items()
        }
