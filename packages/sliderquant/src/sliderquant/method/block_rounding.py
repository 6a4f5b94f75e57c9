"""Compensated rounding of a whole model: one block after the other, front to back.

x_fp is what enters a block in the full-precision model, x_q what enters it in the model whose earlier
blocks are rounded already. How one layer group is rounded stands in ``error_compensation``, what it is
rounded for in ``moments``.

A block costs about two and a half forward passes of each sample: one in the full-precision model, which
is led from layer group to layer group, and in the quantized model one that goes the same way and
computes gate and up projection once more behind their rounding.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from effml_common.errors import NonFiniteError
from sliderquant.config import SliderConfig
from sliderquant.method.decoder import Decoder
from sliderquant.method.error_compensation import corrected_weight, round_layers
from sliderquant.method.expert_rounding import round_experts_
from sliderquant.method.layout import (
    LayerGroup,
    expert_weights,
    layer_groups,
    scale_channels,
)
from sliderquant.method.moments import (
    BLOCK_OUTPUT,
    BlockRun,
    GroupMoments,
    SampleSplit,
    collect_moments,
    run_inside,
    split_samples,
)
from sliderquant.method.parallel import own_samples, process_count
from sliderquant.method.precision import stream_dtype
from sliderquant.method.quantizer import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
    simulate_storage,
)
from sliderquant.method.smoothing import set_smoothing_factors_
from sliderquant.method.task import CalibrationTask

# Tokens of a forward pass: enough that matrix products are efficient.
TOKENS_PER_FORWARD = {"cpu": 2**11, "cuda": 2**14}


@torch.no_grad()
def round_blocks_(task: CalibrationTask) -> None:
    """Round the linear layers of every block, front to back, in place of training them.

    Channel scales and the ``closed_form`` weights of the learnables are set. Several processes share the
    samples and the rows of each weight; all of them get the result.
    """
    # Each process has every n-th sample; the last ones of all are held out.
    decoder = task.decoder
    batch_size = samples_per_forward(decoder, task.config, task.tokens.shape[1])
    own = own_samples(len(task.tokens))
    split = split_samples(len(task.tokens), batch_size, own.start, process_count())

    embedded = decoder.block_inputs(task.tokens[own])
    embedded = embedded.to(stream_dtype(decoder.device, embedded.dtype))
    x_fp, x_q = task.cache("x_fp", embedded), task.cache("x_q", embedded)
    del embedded
    for block, learnables in enumerate(task.learnables):
        decoder.hold([block])
        round_block_(task, block, x_fp, x_q, split)
        task.listeners.on_block(block)

        # Codes of all blocks together would fill a card; they are read again block by block.
        learnables.pack_codes()


def samples_per_forward(decoder: Decoder, config: SliderConfig, seqlen: int) -> int:
    """Return the samples of a forward pass: as many as make it efficient, or as the user asks for."""
    tokens = TOKENS_PER_FORWARD["cpu" if decoder.device.type == "cpu" else "cuda"]
    return max(config.batch_size, tokens // seqlen)


def round_block_(
    task: CalibrationTask,
    block: int,
    x_fp: Float[Tensor, "n t h"],
    x_q: Float[Tensor, "n t h"],
    split: SampleSplit,
) -> None:
    """Round the linear layers of one block, in the order in which the block computes them.

    Both hidden states are replaced by what comes out behind the block.

    Args:
        task: Model, learnables and whom to tell. The block's channel scales and ``closed_form`` weights
            are set in place.
        block: Number of the block.
        x_fp: Hidden states that enter the block in the full-precision model.
        x_q: Hidden states that enter the block in the quantized model.
        split: How the samples are used.

    Raises:
        NonFiniteError: If the inputs of a layer are not finite.
    """
    # Scaling channels leaves the function as it is, and makes rounded activations more precise.
    decoder, learnables = task.decoder, task.learnables[block]
    tensors = decoder.tensors(block)
    set_smoothing_factors_(decoder, block, learnables, tensors, x_fp, split.batch_size)
    scaled = scale_channels(tensors, learnables.sites, list(learnables.factors))
    (output_projection, *_) = decoder.layout(block).outputs
    exact = BlockRun(hidden=x_fp, tensors=tensors | scaled, output_projection=output_projection)

    # The quantized block starts with all linear layers at full precision.
    kept = {name: tensors[name] for name in learnables.ignored} | scaled
    current = tensors | {n: simulate_storage(t, learnables.dtype) for n, t in kept.items()}
    quantized = BlockRun(
        hidden=x_q,
        tensors=current,
        output_projection=output_projection,
        activations=task.activations,
    )

    # Each group sees the inputs that the groups before it produce once they are rounded.
    # Layers that are ignored only take part in the passes.
    layout = decoder.layout(block)
    groups = layer_groups(layout, learnables.ignored)
    has_experts = bool(expert_weights(layout, learnables.ignored))
    strengths: dict[tuple[str, ...], float | None] = {}
    for group in groups:
        is_last = group is groups[-1] and not has_experts
        strengths[group.weights] = _round_group_(
            task, block, group, (exact, quantized), split, relay=is_last
        )
    if has_experts:
        strengths |= round_experts_(task, block, (exact, quantized), split.batch_size)
    is_rounded = has_experts or bool(groups)
    if is_rounded:
        task.listeners.on_rounded(block, strengths)

    # The quantized model moves on behind the block; the other one did so with the last group.
    for run in [quantized] if is_rounded else [exact, quantized]:
        for begin in range(0, len(run.hidden), split.batch_size):
            samples = slice(begin, begin + split.batch_size)
            outputs = run_inside(decoder, block, run, samples, [BLOCK_OUTPUT])
            run.hidden[samples] = outputs[BLOCK_OUTPUT]


def _round_group_(
    task: CalibrationTask,
    block: int,
    group: LayerGroup,
    runs: tuple[BlockRun, BlockRun],
    split: SampleSplit,
    *,
    relay: bool,
) -> float | None:
    """Round the layers of one group, in place; returns the strength of their ridge update.

    A group whose inputs are all zero is rounded to nearest: nothing tells one code from another. Then
    there is no strength.
    """
    exact, quantized = runs
    moments = collect_moments(task.decoder, block, group, runs, split, relay=relay)
    linears = {name: task.learnables[block].linear(name) for name in group.weights}
    activity = wait_for(moments.activity())
    if not math.isfinite(activity):
        raise NonFiniteError(
            f"block {block}: the inputs of {group.weights[0]} are not finite; "
            "use an intact model, or one that fits the type it computes in"
        )

    # Without any activity no code is better than another.
    strength = None
    outputs = [len(exact.tensors[name]) for name in linears]
    if activity == 0:
        rounded = [quantize_weight(exact.tensors[n].float(), linears[n].fmt) for n in linears]
    else:
        strength = wait_for(moments.strength)
        formats = [linear.fmt for linear in linears.values()]
        parts = _parts_by_format(moments, formats, outputs)
        del moments
        rounded = _round_parts(parts, formats, outputs)

    # From here on the quantized model computes with what was rounded.
    for (name, linear), weight in zip(linears.items(), rounded, strict=True):
        linear.closed_form = weight
        dtype = stream_dtype(task.decoder.device, exact.tensors[name].dtype)
        quantized.tensors[name] = weight.dequantize().to(dtype)
    return strength


def _parts_by_format(
    moments: GroupMoments, formats: Sequence[WeightFormat], outputs: Sequence[int]
) -> list[tuple[list[int], GroupMoments]]:
    """Return which layers of a group share a format, and their part of the moments."""
    rows = torch.arange(len(moments.weight)).split(list(outputs))
    parts = []
    for fmt in dict.fromkeys(formats):
        layers = [layer for layer, own in enumerate(formats) if own == fmt]
        of_layers = torch.cat([rows[layer] for layer in layers])
        is_all = len(layers) == len(formats)
        parts.append((layers, moments if is_all else moments.of_rows(of_layers)))
    return parts


def _round_parts(
    parts: list[tuple[list[int], GroupMoments]],
    formats: Sequence[WeightFormat],
    outputs: Sequence[int],
) -> list[QuantizedWeight]:
    """Return the layers of a group, rounded for their input.

    Args:
        parts: From ``_parts_by_format``; it is empty afterwards.
        formats: Storage format of each layer.
        outputs: Rows of each layer's weight.
    """
    rounded: dict[int, QuantizedWeight] = {}
    while parts:
        # One solution for all layers; the moments, as large as H, are not needed after it.
        layers, moments = parts.pop()
        target, curvature = corrected_weight(moments)
        del moments
        rows, fmt = [outputs[layer] for layer in layers], formats[layers[0]]
        rounded.update(zip(layers, round_layers(target, curvature, rows, fmt), strict=True))
    return [rounded[layer] for layer in range(len(formats))]


def wait_for(value: Float[Tensor, ""]) -> float:
    """Return a number that a device has computed; the host waits for it, twice for a layer group."""
    return value.item()
