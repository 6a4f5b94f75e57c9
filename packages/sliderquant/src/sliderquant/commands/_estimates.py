"""How long a calibration will take, from small pieces of it that are timed before it starts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from effml_common.device import synchronize
from effml_common.logging import say, warn
from sliderquant.commands._job import CalibrationJob
from sliderquant.method.block_rounding import samples_per_forward
from sliderquant.method.decoder import run_blocks
from sliderquant.method.error_compensation import REFINEMENT_PASSES, round_and_refine
from sliderquant.method.expert_rounding import (
    collect_expert_moments,
    expert_passes,
    reach_experts_,
)
from sliderquant.method.layout import expert_weights, layer_groups
from sliderquant.method.moments import (
    BLOCK_OUTPUT,
    BlockRun,
    collect_moments,
    run_inside,
    split_samples,
)
from sliderquant.method.parallel import process_count
from sliderquant.method.precision import forward_precision
from sliderquant.method.quantizer import WeightFormat
from sliderquant.method.ridge import factorize, ridge_update

# Forward passes of one block for one batch: a visit of a window takes a forward and a backward pass,
# and as much again for the fake quantizer, 3.5 to 5 in all.
WINDOW_PASSES = 4
# Of a layer group no more than this is timed: input columns of the loops, inputs of the factorisation.
TIMED_COLUMNS, TIMED_INPUTS = 256, 1024


def announce(job: CalibrationJob) -> None:
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
    disk = f", {job.disk_bytes / 2**30:.2f} GiB disk at most" if job.disk_bytes else ""
    say(f"{', '.join(work)}: about {minutes} min, {memory:.2f} GiB memory{disk}")


@torch.no_grad()
def estimate_seconds(job: CalibrationJob) -> float:
    """Return the seconds that a calibration will take on the decoder's device.

    One block of each kind is read and timed, with what enters block 0.
    """
    seconds = 0.0
    try:
        for block, count in _kinds_of_blocks(job).items():
            job.decoder.hold([block])
            seconds += count * _seconds_of_kind(job, block)
    finally:
        job.decoder.hold([])
    return seconds


def _kinds_of_blocks(job: CalibrationJob) -> dict[int, int]:
    """Return the first block of each kind, and how many blocks are like it.

    They have the same parameters, and the same ones are rounded; bits make no difference to speak of.
    """
    firsts: dict[tuple[object, ...], int] = {}
    counts: dict[int, int] = {}
    for block in range(job.decoder.depth):
        shapes = tuple(sorted(job.decoder.shapes(block).items()))
        first = firsts.setdefault((shapes, frozenset(job.formats[block])), block)
        counts[first] = counts.get(first, 0) + 1
    return counts


def _seconds_of_kind(job: CalibrationJob, block: int) -> float:
    """Return the seconds that a calibration spends on average on a block like this one."""
    decoder, samples, seconds = job.decoder, len(job.samples), 0.0
    if job.plan.rounded_blocks and job.formats[block]:
        size = min(samples, samples_per_forward(decoder, job.config, job.samples.shape[1]))
        hidden = decoder.block_inputs(job.samples[:size])
        of_block = _seconds_of_block(job, block, hidden, -(-samples // size))
        seconds = of_block / process_count()
    if not job.plan.windows:
        return seconds

    # One block's forward pass for one batch is the unit of the windows.
    batch_size = job.config.batch_size
    hidden = decoder.block_inputs(job.samples[:batch_size])
    with forward_precision(decoder.device):
        forward = measure_seconds(
            lambda: run_blocks(decoder, [block], hidden, batch_size), decoder.device
        )
    passes = forward * -(-samples // batch_size)
    visits = job.plan.block_visits / decoder.depth
    return seconds + WINDOW_PASSES * visits * job.config.window_epochs * passes


def _seconds_of_block(
    job: CalibrationJob, block: int, hidden: Float[Tensor, "n t h"], batches: int
) -> float:
    """Return the seconds that compensated rounding of a block takes, from one batch of hidden states."""
    # Each layer group once in both models, as often as there are batches, and the way to the end.
    decoder, layout = job.decoder, job.decoder.layout(block)
    runs = [
        BlockRun(
            hidden=hidden.clone(),
            tensors=dict(decoder.tensors(block)),
            output_projection=layout.outputs[0],
        )
        for _ in range(2)
    ]
    split = replace(split_samples(len(hidden), len(hidden)), fitted=len(hidden), held_out=False)

    ignored, seconds = job.learnables[block].ignored, 0.0
    experts, groups = expert_weights(layout, ignored), layer_groups(layout, ignored)
    for group in groups:
        begin = time.perf_counter()
        is_last = group is groups[-1] and not experts
        collect_moments(decoder, block, group, (runs[0], runs[1]), split, relay=is_last)
        synchronize(decoder.device)
        seconds += batches * (time.perf_counter() - begin)
        weights = {name: decoder.tensors(block)[name] for name in group.weights}
        seconds += _seconds_of_group(weights, job.formats[block])
    if experts:
        seconds += _seconds_of_experts(job, block, (runs[0], runs[1]), batches)

    everything = slice(0, len(hidden))
    return seconds + batches * measure_seconds(
        lambda: run_inside(decoder, block, runs[1], everything, [BLOCK_OUTPUT]), decoder.device
    )


def _seconds_of_experts(
    job: CalibrationJob, block: int, runs: tuple[BlockRun, BlockRun], batches: int
) -> float:
    """Return the seconds that it takes to round all experts of a block, from one of them.

    Their moments are collected as often as memory asks for it, from one batch.
    """
    tensors, ignored = job.decoder.tensors(block), job.learnables[block].ignored
    names = expert_weights(job.decoder.layout(block), ignored)
    weights = {name: tensors[name] for name in names}

    # As many tokens as all batches have: how many experts lack some depends on it.
    begin = time.perf_counter()
    experts = reach_experts_(job.decoder, block, runs, len(runs[1].hidden))
    counts, tokens = [batches * count for count in experts.counts], batches * experts.tokens
    experts = replace(experts, counts=counts, tokens=tokens)
    for name, weight in weights.items():
        for numbers in expert_passes(len(weight), weight.shape[-1]):
            collect_expert_moments(experts, name, numbers)
    synchronize(job.decoder.device)
    seconds = batches * (time.perf_counter() - begin)

    for name, weight in weights.items():
        seconds += len(weight) * _seconds_of_layers([weight[0]], job.formats[block][name])
    return seconds


def _seconds_of_group(
    weights: Mapping[str, Float[Tensor, "out in"]], formats: Mapping[str, WeightFormat]
) -> float:
    """Return the seconds that it takes to round layers that read one input, format by format."""
    by_format: dict[WeightFormat, list[Tensor]] = {}
    for name, weight in weights.items():
        by_format.setdefault(formats[name], []).append(weight)
    return sum(_seconds_of_layers(layers, fmt) for fmt, layers in by_format.items())


def _seconds_of_layers(weights: Sequence[Float[Tensor, "out in"]], fmt: WeightFormat) -> float:
    """Return the seconds that it takes to round layers of one format, from some of their columns."""
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
    target = torch.cat(list(weights))[:, :columns].T.float().contiguous()
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
