"""Compensated rounding of a whole model: one block after the other, front to back.

x_fp is what enters a block in the full-precision model, x_q what enters it in the model whose earlier
blocks are rounded already. How one weight is rounded stands in ``error_compensation``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.method.activations import ActivationFormat, fake_quantize_tokens
from sliderquant.method.decoder import Decoder
from sliderquant.method.error_compensation import round_weight
from sliderquant.method.layout import WEIGHT_SUFFIX, LayerGroup, layer_groups, scale_channels
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.quantizer import simulate_storage
from sliderquant.method.smoothing import set_smoothing_factors_
from sliderquant.method.task import CalibrationTask


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRun:
    """One block as one of the two models runs it.

    Attributes:
        hidden: Hidden states that enter the block, [n, t, h].
        tensors: Its parameters by name.
        activations: How the model rounds activations; ``None`` if it does not.
    """

    hidden: Float[Tensor, "n t h"]
    tensors: dict[str, Tensor]
    activations: ActivationFormat | None = None


@torch.no_grad()
def round_blocks_(task: CalibrationTask) -> None:
    """Round the linear layers of every block, front to back, in place of training them.

    Channel scales and the ``closed_form`` weights of the learnables are set; fused experts stay as they
    are.
    """
    decoder, batch_size = task.decoder, task.config.batch_size
    embedded = decoder.block_inputs(task.tokens)
    x_fp, x_q = task.cache("x_fp", embedded), task.cache("x_q", embedded)
    for block, learnables in enumerate(task.learnables):
        # Round the block for the inputs that it gets behind the blocks that are rounded already.
        decoder.hold([block])
        tensors = decoder.tensors(block)
        full_precision = BlockRun(hidden=x_fp, tensors=tensors)
        quantized = round_block_(
            decoder, block, learnables, full_precision, x_q, batch_size, task.activations
        )

        # Both models move on behind the block.
        for run in (full_precision, quantized):
            for part in run.hidden.split(batch_size):
                part.copy_(decoder.run_block(block, part, run.tensors, run.activations))
        task.listeners.on_block(block)

        # Codes of all blocks together would fill a card; they are read again block by block.
        learnables.move_codes("cpu")


def round_block_(
    decoder: Decoder,
    block: int,
    learnables: BlockLearnables,
    full_precision: BlockRun,
    x_q: Float[Tensor, "n t h"],
    batch_size: int,
    activations: ActivationFormat | None,
) -> BlockRun:
    """Round the linear layers of one block, in the order in which the block computes them.

    Args:
        decoder: The model.
        block: Number of the block.
        learnables: Of the block; channel scales and ``closed_form`` weights are set in place.
        full_precision: The block in the full-precision model.
        x_q: Hidden states that enter the block in the quantized model.
        batch_size: Samples per forward pass.
        activations: How the quantized model rounds activations; ``None`` if it does not.

    Returns:
        The block in the quantized model.
    """
    # Scaling channels leaves the function as it is, and makes rounded activations more precise.
    tensors, x_fp = full_precision.tensors, full_precision.hidden
    set_smoothing_factors_(decoder, block, learnables, tensors, x_fp, batch_size)
    scaled = scale_channels(tensors, learnables.sites, list(learnables.factors))
    exact = BlockRun(hidden=x_fp, tensors=tensors | scaled)

    # The quantized block starts with all linear layers at full precision.
    current = tensors | {n: simulate_storage(t, learnables.fmt) for n, t in scaled.items()}
    quantized = BlockRun(hidden=x_q, tensors=current, activations=activations)

    # Each group sees the inputs that the groups before it produce once they are rounded.
    for group in layer_groups(decoder.layout(block)):
        second_moment, cross_moments = collect_moments(
            decoder, block, group, exact, quantized, batch_size
        )
        for name in group.weights:
            linear = learnables.linear(name)
            linear.closed_form = round_weight(
                exact.tensors[name], linear.fmt, second_moment, cross_moments[name]
            )
            current[name] = linear(exact.tensors[name])
    return quantized


def collect_moments(
    decoder: Decoder,
    block: int,
    group: LayerGroup,
    exact: BlockRun,
    quantized: BlockRun,
    batch_size: int,
) -> tuple[Float[Tensor, "in in"], dict[str, Float[Tensor, "in out"]]]:
    """Return X^T X of a layer group, and X^T E of each of its weights, in float64.

    Args:
        decoder: The model.
        block: Number of the block.
        group: Linear layers that read the same input.
        exact: The block in the full-precision model.
        quantized: The block in the quantized model, whose earlier groups are rounded already.
        batch_size: Samples per forward pass.
    """
    reader = group.weights[0].removesuffix(WEIGHT_SUFFIX)
    modules = [reader] if group.target_module is None else [reader, group.target_module]
    second_moment: Tensor | float = 0.0
    cross_moments: dict[str, Tensor | float] = dict.fromkeys(group.weights, 0.0)
    batches = zip(exact.hidden.split(batch_size), quantized.hidden.split(batch_size), strict=True)
    for hidden_of_both in batches:
        # What enters the group, and the place where its output arrives, in both models.
        wanted, present = (
            {
                name: value.flatten(0, -2)
                for name, value in decoder.inputs_inside(
                    block, hidden, run.tensors, modules, run.activations
                ).items()
            }
            for hidden, run in zip(hidden_of_both, (exact, quantized), strict=True)
        )

        # X is what the layers multiply with.
        x = present[reader]
        if quantized.activations is not None:
            x = fake_quantize_tokens(x, quantized.activations)
        second_moment = second_moment + (x.T @ x).double()

        # E is what the full-precision weight on X lacks, or what the residual stream lacks.
        for name in group.weights:
            if group.target_module is None:
                error = (wanted[reader] - x) @ exact.tensors[name].T
            else:
                error = wanted[group.target_module] - present[group.target_module]
            cross_moments[name] = cross_moments[name] + (x.T @ error).double()
    return (
        torch.as_tensor(second_moment),
        {name: torch.as_tensor(moment) for name, moment in cross_moments.items()},
    )
