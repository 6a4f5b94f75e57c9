"""Compensated rounding of fused experts, each for the tokens that the router sends it.

Symbols: X_e [n_e, in] is what expert e reads in the quantized model, in front of its gate and up
projection or of its down projection; X [n, in] is what it would read if it got all n tokens.

1. ``reach_experts_`` counts how many tokens each expert receives. The router reads what the experts
   read, so rounding experts of the same block does not change it.
2. ``collect_expert_moments`` sums H_e = X_e^T X_e. With few tokens, error feedback fits their noise: an
   expert with fewer than ``TOKENS_PER_INPUT`` tokens for each input is filled up to that number with
   the average of all tokens, (TOKENS_PER_INPUT in - n_e) X^T X / n.
3. Each expert is rounded for its H_e as any layer is, see ``error_compensation``; the gate and up
   projections first, so that the down projections read what the rounded ones give.

Experts do not make up for errors of the layers before: their target is their own weight. Where the
quantized model chooses another expert than the full-precision model, there is no output to aim at.

In front of gate and up, tokens count alike (see ``moments``). Moments of many experts fill a card; they
are collected for as many experts at a time as ``EXPERT_MOMENT_BYTES`` holds.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from effml_common.errors import NonFiniteError
from sliderquant.method.activations import fake_quantize_tokens
from sliderquant.method.decoder import Decoder
from sliderquant.method.error_compensation import round_layers
from sliderquant.method.layout import expert_weights, mlp_norm
from sliderquant.method.moments import BLOCK_OUTPUT, BlockRun, inverse_size, run_inside
from sliderquant.method.parallel import own_columns, sum_over_processes
from sliderquant.method.precision import forward_precision, stream_dtype, tf32_products
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat, quantize_weight
from sliderquant.method.ridge import factorize
from sliderquant.method.sampling import to_device
from sliderquant.method.task import CalibrationTask

EXPERT_MOMENT_BYTES = 2**30  # of X^T X of the experts that are collected together, float64
TOKENS_PER_INPUT = 4  # tokens for each input of an expert below which it is filled up


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertBlock:
    """One block whose experts are to be rounded, in the quantized model.

    Attributes:
        decoder: The model.
        block: Number of the block.
        run: The block in the quantized model, which stands behind the attention.
        batch_size: Samples per forward pass.
        counts: Tokens that each expert receives, of all processes.
        tokens: Tokens of all processes.
    """

    decoder: Decoder
    block: int
    run: BlockRun
    batch_size: int
    counts: Sequence[int]
    tokens: int


def round_experts_(
    task: CalibrationTask, block: int, runs: tuple[BlockRun, BlockRun], batch_size: int
) -> dict[tuple[str, ...], None]:
    """Round the fused experts of a block, in place, and lead the full-precision model to its end.

    Weights that are ignored stay as they are; each of the others has a format of its own.

    Args:
        task: Model, learnables and whom to tell; the ``closed_form`` of the experts is set.
        block: Number of the block.
        runs: The block in the full-precision and in the quantized model, whose other linear layers are
            rounded already.
        batch_size: Samples per forward pass.

    Returns:
        A key for each weight with experts whose inputs are all zero, which names them. They are rounded
        to nearest.

    Raises:
        NonFiniteError: If the inputs of an expert are not finite.
    """
    exact, _ = runs
    learnables = task.learnables[block]
    names = expert_weights(task.decoder.layout(block), learnables.ignored)
    experts = reach_experts_(task.decoder, block, runs, batch_size)

    # Say which experts have too few tokens of their own to be rounded for them.
    least = max(exact.tensors[name].shape[-1] for name in names)
    rare = {expert: count for expert, count in enumerate(experts.counts) if count < least}
    if rare:
        task.listeners.on_rare_experts(block, rare, least)

    # Gate and up first: the down projections read what the rounded ones give.
    idle: dict[tuple[str, ...], None] = {}
    for name in names:
        linear = learnables.linear(name)
        rounded, unread = _round_weight(experts, name, exact.tensors[name], linear.fmt)
        if unread:
            idle[tuple(f"{name}[{expert}]" for expert in unread)] = None

        # From here on the quantized model computes with what was rounded.
        linear.closed_form = stack_experts(rounded)
        dtype = stream_dtype(task.decoder.device, exact.tensors[name].dtype)
        experts.run.tensors[name] = torch.stack([part.dequantize().to(dtype) for part in rounded])
    return idle


def reach_experts_(
    decoder: Decoder, block: int, runs: tuple[BlockRun, BlockRun], batch_size: int
) -> ExpertBlock:
    """Lead the full-precision model to the end of a block, the quantized one behind its attention.

    Returns:
        The block in the quantized model, with the tokens that each expert receives.
    """
    exact, quantized = runs
    layout = decoder.layout(block)
    for run, target in ((exact, BLOCK_OUTPUT), (quantized, mlp_norm(layout))):
        for begin in range(0, len(run.hidden), batch_size):
            samples = slice(begin, begin + batch_size)
            run.hidden[samples] = run_inside(decoder, block, run, samples, [target])[target]
        run.heads, run.behind_attention = None, True

    # The last one of the counts is that of all tokens.
    experts = len(quantized.tensors[expert_weights(layout)[0]])
    counts = torch.zeros(experts + 1, dtype=torch.float64, device=decoder.device)
    for x, chosen in _batches(decoder, block, quantized, batch_size):
        flat = chosen.flatten()
        counts.index_add_(0, flat, counts.new_ones(len(flat)))
        counts[experts] += len(x)
    *of_experts, tokens = map(int, wait_for(sum_over_processes(counts)))
    return ExpertBlock(
        decoder=decoder,
        block=block,
        run=quantized,
        batch_size=batch_size,
        counts=of_experts,
        tokens=tokens,
    )


def _batches(
    decoder: Decoder, block: int, run: BlockRun, batch_size: int
) -> Iterator[tuple[Float[Tensor, "n in"], Int[Tensor, "n k"]]]:
    """Yield what the experts of a block multiply with, and which of them each token goes to."""
    for begin in range(0, len(run.hidden), batch_size):
        hidden = to_device(run.hidden[begin : begin + batch_size], decoder.device)
        with forward_precision(decoder.device):
            attention = run.attention_output(slice(begin, begin + batch_size), hidden)
            x, chosen = decoder.expert_inputs(
                block, hidden, run.tensors, run.activations, attention
            )
        yield (x if run.activations is None else fake_quantize_tokens(x, run.activations)), chosen


def expert_passes(experts: int, inputs: int) -> list[range]:
    """Return the experts whose moments are collected in each pass over the samples."""
    at_once = max(1, EXPERT_MOMENT_BYTES // (8 * inputs**2))
    return [range(begin, min(begin + at_once, experts)) for begin in range(0, experts, at_once)]


def collect_expert_moments(
    experts: ExpertBlock, name: str, numbers: range
) -> Float[Tensor, "experts in in"]:
    """Return H_e of some experts, filled up where they have few tokens, of all processes, float64.

    Args:
        experts: The block and how many tokens its experts have.
        name: Weight whose inputs are asked for.
        numbers: Which experts.
    """
    decoder, run = experts.decoder, experts.run
    inputs = run.tensors[name].shape[-1]
    second = torch.zeros(len(numbers), inputs, inputs, dtype=torch.float64, device=decoder.device)

    # How much of all tokens makes up for the tokens that an expert lacks.
    enough = TOKENS_PER_INPUT * inputs
    shares = [max(0, enough - experts.counts[expert]) / experts.tokens for expert in numbers]

    reader = _Reader(experts, name)
    for x, chosen in _batches(decoder, experts.block, run, experts.batch_size):
        rows = rows_of_experts(chosen, len(experts.counts))
        inputs_of_all = reader.common(x)
        everyone = None
        for expert, total, share in zip(numbers, second, shares, strict=True):
            total += reader.gram(inputs_of_all[rows[expert]], expert)
            if share:
                # All tokens are alike for all experts in front of gate and up.
                if everyone is None or not reader.is_shared:
                    everyone = reader.gram(inputs_of_all, expert)
                total.add_(everyone, alpha=share)
    return sum_over_processes(second)


def rows_of_experts(chosen: Int[Tensor, "n k"], experts: int) -> Sequence[Int[Tensor, " n_e"]]:
    """Return the numbers of each expert's tokens; the host waits once, for how many there are."""
    flat = chosen.flatten()
    sizes = wait_for(flat.new_zeros(experts).index_add_(0, flat, torch.ones_like(flat)))
    return (flat.argsort(stable=True) // chosen.shape[1]).split(sizes)


class _Reader:
    """Makes what an expert's weight reads of the tokens in front of the experts.

    Attributes:
        is_shared: Whether a token is the same for every expert: it is in front of gate and up.
    """

    def __init__(self, experts: ExpertBlock, name: str) -> None:
        self._decoder, self._block = experts.decoder, experts.block
        self._activations = experts.run.activations
        gate_up, _ = expert_weights(experts.decoder.layout(experts.block))
        self._gate_up = experts.run.tensors[gate_up]
        self._dtype = torch.promote_types(self._gate_up.dtype, torch.float32)
        self.is_shared = name == gate_up

    def common(self, x: Float[Tensor, "n h"]) -> Float[Tensor, "n h"]:
        """Return the part that is the same for all experts."""
        if not self.is_shared:
            return x
        x = x.to(self._dtype)
        return x * inverse_size(x)

    def gram(self, x: Float[Tensor, "n h"], expert: int) -> Float[Tensor, "in in"]:
        """Return X^T X of some tokens for an expert."""
        if not self.is_shared:
            x = self._inner(x, expert).to(self._dtype)
        with tf32_products(self._decoder.device):
            return x.T @ x

    def _inner(self, x: Float[Tensor, "n h"], expert: int) -> Float[Tensor, "n i"]:
        """Return what the down projection of an expert multiplies with."""
        activations = self._activations
        with forward_precision(self._decoder.device):
            product = torch.nn.functional.linear(x, self._gate_up[expert])
            inner = self._decoder.gate_experts(self._block, product)
        return inner if activations is None else fake_quantize_tokens(inner, activations)


def _round_weight(
    experts: ExpertBlock, name: str, weight: Float[Tensor, "experts out in"], fmt: WeightFormat
) -> tuple[list[QuantizedWeight], list[int]]:
    """Return one weight of every expert, rounded, and the experts whose inputs are all zero."""
    rounded, unread = [], []
    for numbers in expert_passes(len(weight), weight.shape[-1]):
        moments = collect_expert_moments(experts, name, numbers)

        # One wait for all experts of the pass.
        activities = wait_for(moments.diagonal(dim1=1, dim2=2).sum(dim=1))
        if not all(map(math.isfinite, activities)):
            raise NonFiniteError(
                f"block {experts.block}: the inputs of {name} are not finite; "
                "use an intact model, or one that fits the type it computes in"
            )

        # Without any activity no code is better than another.
        for expert, moment, activity in zip(numbers, moments, activities, strict=True):
            if activity == 0:
                unread.append(expert)
                rounded.append(quantize_weight(weight[expert].float(), fmt))
            else:
                rounded.append(round_expert(weight[expert], moment, fmt))
    return rounded, unread


def round_expert(
    weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], fmt: WeightFormat
) -> QuantizedWeight:
    """Return one expert's weight, rounded for its moments; processes share its rows."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    curvature = factorize(moment, weight.dtype)
    return round_layers(weight[own_columns(len(weight))].T, curvature, [len(weight)], fmt)[0]


def stack_experts(experts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights of equal shape and format as one with a leading axis."""
    zeros = [expert.zero for expert in experts if expert.zero is not None]
    return QuantizedWeight(
        codes=torch.stack([expert.codes for expert in experts]),
        scale=torch.stack([expert.scale for expert in experts]),
        zero=torch.stack(zeros) if zeros else None,
        fmt=experts[0].fmt,
    )


def wait_for(values: Shaped[Tensor, " n"]) -> list[Any]:
    """Return numbers that a device has computed; the host waits for them.

    For each block once, for each pass over the samples once, and once more for each of its batches.
    """
    return values.tolist()
