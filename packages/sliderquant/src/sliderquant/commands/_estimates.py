"""How long a calibration will take, from small pieces of it that are timed before it starts."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common.device import synchronize
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.commands.inspect import Plan
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import run_blocks
from sliderquant.method.error_compensation import TURNS, fitted_steps, sweep_columns_
from sliderquant.method.quantizer import WeightFormat, codes, quantization_grid

# Forward passes of one block for one batch, whatever the way of rounding does with them.
WINDOW_PASSES = (
    4  # per visit: forward, backward, and as much again for the fake quantizer: 3.5 to 5
)
ROUNDING_PASSES = 9  # 4 layer groups in both models, the relay of both, moments: measured 7 to 10
# What is timed of a weight instead of all of it.
COLUMNS, ROWS = 32, 32


@torch.no_grad()
def estimated_seconds(
    decoder: TransformersDecoder,
    samples: Int[Tensor, "n t"],
    plan: Plan,
    config: SliderConfig,
    fmt: WeightFormat,
) -> float:
    """Return the seconds that a calibration will take on the decoder's device.

    Args:
        decoder: The model; its block 0 is read.
        samples: Calibration samples.
        plan: Of the calibration.
        config: Its settings.
        fmt: Storage format.
    """
    decoder.hold([0])
    hidden = decoder.block_inputs(samples[: config.batch_size])
    forward = timed(lambda: run_blocks(decoder, [0], hidden, config.batch_size), decoder.device)
    batches = -(-len(samples) // config.batch_size)
    if plan.windows:
        seconds = WINDOW_PASSES * plan.block_visits * config.epochs * forward * batches
    else:
        # Weights of one shape take equally long.
        by_shape: dict[torch.Size, float] = {}
        weights = [w for w in decoder.linear_weights(0).values() if w.ndim == 2]
        for weight in weights:
            if weight.shape not in by_shape:
                by_shape[weight.shape] = rounding_seconds(weight, fmt)
        rounding = sum(by_shape[weight.shape] for weight in weights)
        seconds = decoder.depth * (ROUNDING_PASSES * forward * batches + rounding)
    decoder.hold([])
    return seconds


def rounding_seconds(weight: Float[Tensor, "out in"], fmt: WeightFormat) -> float:
    """Return the seconds that compensated rounding of one weight takes, from a few columns and rows."""
    columns = weight.shape[1]
    size = fmt.columns_per_group(columns)
    h = torch.eye(columns, device=weight.device)
    step, zero = quantization_grid(weight.unflatten(-1, (-1, size)), fmt)
    steps, zeros = (x.squeeze(-1).repeat_interleave(size, dim=-1) for x in (step, zero))
    code = codes(weight, steps, zeros, fmt)
    slope = weight - (code - zeros) * steps

    # The column loops: one of error feedback, one a turn of coordinate descent.
    visited = min(COLUMNS, columns)
    loop = timed(lambda: sweep_columns_(code, slope, steps, zeros, fmt, h, visited), weight.device)
    loops = (TURNS + 1) * loop * columns / visited

    # The steps of every row by least squares, once a turn.
    rows = min(ROWS, len(weight))
    levels = (code - zeros)[:rows].unflatten(-1, (-1, size))
    target, first, wide = weight[:rows], step[:rows].squeeze(-1), h.double()
    fit = timed(lambda: fitted_steps(levels, first, target, wide), weight.device)
    return loops + TURNS * fit * len(weight) / rows


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a second call takes, when the device has done all of it."""
    run()
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin
