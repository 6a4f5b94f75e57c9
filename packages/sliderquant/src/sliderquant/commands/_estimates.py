"""How long a calibration will take, from small pieces of it that are timed before it starts."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from effml_common.device import synchronize
from effml_common.logging import say, warn
from sliderquant.commands._job import Job
from sliderquant.method.block_rounding import samples_per_forward
from sliderquant.method.decoder import Decoder, run_blocks
from sliderquant.method.error_compensation import REFINEMENT_PASSES, round_and_refine
from sliderquant.method.layout import LayerGroup, layer_groups
from sliderquant.method.moments import BlockRun, collect_moments, run_inside, split_samples
from sliderquant.method.parallel import process_count
from sliderquant.method.precision import forward_precision
from sliderquant.method.quantizer import WeightFormat
from sliderquant.method.ridge import factorize, ridge_update

# Forward passes of one block for one batch: a visit of a window takes a forward and a backward pass,
# and as much again for the fake quantizer, 3.5 to 5 in all.
WINDOW_PASSES = 4
# Of a layer group no more than this is timed: input columns of the loops, inputs of the factorisation.
TIMED_COLUMNS, TIMED_INPUTS = 256, 1024


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
    work = [f"{plan.rounded_blocks} blocks to round"] if plan.rounded_blocks else []
    if plan.windows:
        stages = f" x {plan.stages} stages" if plan.stages > 1 else ""
        work.append(f"{len(plan.windows)} windows{stages}, {plan.updates} updates")
    work = work or ["nothing to calibrate"]
    minutes = max(1, round(estimate_seconds(job) / 60))
    memory = sum((plan.memory_gib or {}).values())
    disk = sum(path.stat().st_size for path in job.files) / 2**30
    say(
        f"{', '.join(work)}: about {minutes} min, {memory:.2f} GiB memory, {disk:.2f} GiB disk at most"
    )


@torch.no_grad()
def estimate_seconds(job: Job) -> float:
    """Return the seconds that a calibration will take on the decoder's device; block 0 is read."""
    decoder, samples, seconds = job.decoder, len(job.samples), 0.0
    decoder.hold([0])
    try:
        if job.plan.rounded_blocks:
            size = min(samples, samples_per_forward(decoder, job.config, job.samples.shape[1]))
            hidden = decoder.block_inputs(job.samples[:size])
            of_block = _seconds_of_block(decoder, hidden, usual_format(job), -(-samples // size))
            seconds = job.plan.rounded_blocks * of_block / process_count()
        if not job.plan.windows:
            return seconds

        # One block's forward pass for one batch is the unit of the windows.
        batch_size = job.config.batch_size
        hidden = decoder.block_inputs(job.samples[:batch_size])
        with forward_precision(decoder.device):
            forward = measure_seconds(
                lambda: run_blocks(decoder, [0], hidden, batch_size), decoder.device
            )
        passes = forward * -(-samples // batch_size)
        return seconds + WINDOW_PASSES * job.plan.block_visits * job.config.window_epochs * passes
    finally:
        decoder.hold([])


def usual_format(job: Job) -> WeightFormat:
    """Return the storage format of most layers."""
    return Counter(fmt for of_block in job.formats for fmt in of_block.values()).most_common(1)[0][
        0
    ]


def _seconds_of_block(
    decoder: Decoder, hidden: Float[Tensor, "n t h"], fmt: WeightFormat, batches: int
) -> float:
    """Return the seconds that compensated rounding of block 0 takes, from one batch of hidden states."""
    # Each layer group once in both models, as often as there are batches, and the way to the end.
    projection = decoder.layout(0).outputs[0]
    runs = [
        BlockRun(hidden=hidden.clone(), tensors=decoder.tensors(0), output_projection=projection)
        for _ in range(2)
    ]
    split = replace(split_samples(len(hidden), len(hidden)), fitted=len(hidden), held_out=False)

    groups, seconds = layer_groups(decoder.layout(0)), 0.0
    for group in groups:
        begin = time.perf_counter()
        is_last = group is groups[-1]
        collect_moments(decoder, 0, group, (runs[0], runs[1]), split, relay=is_last)
        synchronize(decoder.device)
        seconds += batches * (time.perf_counter() - begin)
        seconds += _seconds_of_group(decoder, group, fmt)
    everything = slice(0, len(hidden))
    return seconds + batches * measure_seconds(
        lambda: run_inside(decoder, 0, runs[1], everything, [""]), decoder.device
    )


def _seconds_of_group(decoder: Decoder, group: LayerGroup, fmt: WeightFormat) -> float:
    """Return the seconds that it takes to round the layers of a group, from a part of their columns."""
    weights = [decoder.tensors(0)[name] for name in group.weights]
    outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
    device = weights[0].device

    # Two factorisations and solutions, which grow with the third power of the inputs.
    timed = min(inputs, TIMED_INPUTS)
    moment = torch.eye(timed, dtype=torch.float64, device=device)
    cross = moment.new_ones(timed, min(timed, outputs))

    def solve() -> None:
        curvature = factorize(moment)
        ridge_update(curvature, cross)
        curvature.inverse_factor()

    seconds = 2 * measure_seconds(solve, device) * (inputs / timed) ** 3

    # The column loops, and products of the weight with H: for each refinement the gradient twice, a
    # step of the scales each, and half of one while the columns are visited.
    size = fmt.columns_per_group(inputs)
    columns = min(inputs, size if size > TIMED_COLUMNS else TIMED_COLUMNS // size * size)
    target = torch.cat(weights)[:, :columns].T.float().contiguous()
    curvature = factorize(torch.eye(columns, dtype=torch.float64, device=device))
    loops = measure_seconds(lambda: round_and_refine(target, fmt, curvature), device)
    product = measure_seconds(lambda: target.T @ target[:, : min(outputs, columns)], device)
    flops = columns * outputs * min(outputs, columns)
    products = 0.5 + REFINEMENT_PASSES * 3.5
    return seconds + loops * inputs / columns + products * product / flops * inputs**2 * outputs


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a second call takes, when the device has done all of it."""
    run()
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin
