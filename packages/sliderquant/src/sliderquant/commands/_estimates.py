"""How long a calibration will take, from small pieces of it that are timed before it starts."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from effml_common.device import synchronize
from effml_common.logging import say, warn
from sliderquant.commands._job import Job
from sliderquant.method.decoder import run_blocks
from sliderquant.method.error_compensation import REFINEMENT_PASSES, refit_scales, sweep_columns_
from sliderquant.method.quantizer import WeightFormat, nearest_codes, quantization_grid

# Forward passes of one block for one batch, whatever the method does with them. A visit of a window
# takes a forward and a backward pass, and as much again for the fake quantizer: 3.5 to 5 in all.
WINDOW_PASSES = 4
# 4 layer groups in both models, the relay of both, moments: measured 7 to 10.
ROUNDING_PASSES = 9
# What is timed of a weight instead of all of it.
TIMED_COLUMNS, TIMED_ROWS = 32, 32


def announce(job: Job) -> None:
    """Print the estimate of time, memory and disk."""
    config, plan, depth = job.config, job.plan, job.decoder.depth

    # A model too small for both ends of the schedule still runs.
    ends = config.shallow + config.deep
    if plan.windows and config.schedule == "slider" and depth < ends:
        warn(
            f"{depth} blocks are fewer than shallow + deep = {ends}: they are halved between both ends"
        )

    # One line that says what it will cost.
    work = f"{depth} blocks to round"
    if plan.windows:
        work = f"{len(plan.windows)} windows x {plan.stages} stages, {plan.updates} updates"
    minutes = max(1, round(estimate_seconds(job) / 60))
    memory = sum((plan.memory_gib or {}).values())
    disk = sum(path.stat().st_size for path in job.files) / 2**30
    say(f"{work}: about {minutes} min, {memory:.2f} GiB memory, {disk:.2f} GiB disk at most")


@torch.no_grad()
def estimate_seconds(job: Job) -> float:
    """Return the seconds that a calibration will take on the decoder's device; block 0 is read."""
    # One block's forward pass for one batch is the unit of both methods.
    decoder, batch_size = job.decoder, job.config.batch_size
    decoder.hold([0])
    hidden = decoder.block_inputs(job.samples[:batch_size])
    forward = measure_seconds(lambda: run_blocks(decoder, [0], hidden, batch_size), decoder.device)
    passes = forward * -(-len(job.samples) // batch_size)

    # Windows repeat it; compensated rounding solves for every weight besides.
    if job.plan.windows:
        seconds = WINDOW_PASSES * job.plan.block_visits * job.config.epochs * passes
    else:
        weights = [w for w in decoder.linear_weights(0).values() if w.ndim == 2]
        seconds = decoder.depth * (
            ROUNDING_PASSES * passes + estimate_weights(weights, job.weights)
        )
    decoder.hold([])
    return seconds


def estimate_weights(weights: list[Tensor], fmt: WeightFormat) -> float:
    """Return the seconds that compensated rounding of weights takes; those of one shape take as long."""
    by_shape: dict[torch.Size, float] = {}
    for weight in weights:
        if weight.shape not in by_shape:
            by_shape[weight.shape] = estimate_rounding(weight, fmt)
    return sum(by_shape[weight.shape] for weight in weights)


def estimate_rounding(weight: Float[Tensor, "out in"], fmt: WeightFormat) -> float:
    """Return the seconds that compensated rounding of one weight takes, from a few columns and rows."""
    # A rounded weight and its grid, as they are after error feedback.
    columns = weight.shape[1]
    size = fmt.columns_per_group(columns)
    hessian = torch.eye(columns, device=weight.device)
    scale, zero = quantization_grid(weight.unflatten(-1, (-1, size)), fmt)
    scales, zeros = (x.squeeze(-1).repeat_interleave(size, dim=-1) for x in (scale, zero))
    code = nearest_codes(weight, scales, zeros, fmt)
    slope = weight - (code - zeros) * scales

    # The column loops: one of error feedback, one a turn of coordinate descent.
    visited = min(TIMED_COLUMNS, columns)
    loop = measure_seconds(
        lambda: sweep_columns_(code, slope, scales, zeros, fmt, hessian, visited), weight.device
    )
    loops = (REFINEMENT_PASSES + 1) * loop * columns / visited

    # The scales of every row by least squares, once a turn.
    rows = min(TIMED_ROWS, len(weight))
    levels = (code - zeros)[:rows].unflatten(-1, (-1, size))
    target, first, wide = weight[:rows], scale[:rows].squeeze(-1), hessian.double()
    fit = measure_seconds(lambda: refit_scales(levels, first, target, wide), weight.device)
    return loops + REFINEMENT_PASSES * fit * len(weight) / rows


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a second call takes, when the device has done all of it."""
    run()
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin
