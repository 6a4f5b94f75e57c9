"""Compensated rounding of fused experts, each for the tokens that the router sends it.

Symbols: X_e [n_e, in] is what expert e reads in the quantized model, in front of its gate and up
projection or of its down projection; X [n, in] is what it would read if it got all n tokens.

1. ``count_expert_tokens`` says how many tokens each expert receives. The router reads what the experts
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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common.errors import NonFiniteError
from sliderquant.method.activations import fake_quantize_tokens
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
class ExpertPass:
    """One block whose experts are to be rounded, in the quantized model.

    Attributes:
        task: Model, learnables and whom to tell.
        block: Number of the block.
        run: The block in the quantized model, which stands behind the attention.
        batch_size: Samples per forward pass.
        counts: Tokens that each expert receives, of all processes.
        tokens: Tokens of all processes.
    """

    task: CalibrationTask
    block: int
    run: BlockRun
    batch_size: int
    counts: Sequence[int]
    tokens: int


def round_experts_(
    task: CalibrationTask, block: int, runs: tuple[BlockRun, BlockRun], batch_size: int
) -> dict[tuple[str, ...], None]:
    """Round the fused experts of a block, in place; both runs come as far as the block's experts.

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
    exact, quantized = runs
    layout = task.decoder.layout(block)
    names = expert_weights(layout)
    _leave_attention_(task, block, runs, mlp_norm(layout), batch_size)
    counts, tokens = count_expert_tokens(task, block, quantized, batch_size)

    # Say which experts have too few tokens of their own to be rounded for them.
    least = max(exact.tensors[name].shape[-1] for name in names)
    rare = {expert: count for expert, count in enumerate(counts) if count < least}
    if rare:
        task.listeners.on_rare_experts(block, rare, least)

    of_block = ExpertPass(
        task=task, block=block, run=quantized, batch_size=batch_size, counts=counts, tokens=tokens
    )
    idle: dict[tuple[str, ...], None] = {}
    for name in names:
        unread = _round_weight_(of_block, name, exact.tensors[name])
        if unread:
            idle[tuple(f"{name}[{expert}]" for expert in unread)] = None
    return idle


def _leave_attention_(
    task: CalibrationTask,
    block: int,
    runs: tuple[BlockRun, BlockRun],
    norm: str,
    batch_size: int,
) -> None:
    """Lead the full-precision model to the end of the block, the other one behind the attention."""
    exact, quantized = runs
    for run, target in ((exact, BLOCK_OUTPUT), (quantized, norm)):
        for begin in range(0, len(run.hidden), batch_size):
            samples = slice(begin, begin + batch_size)
            seen = run_inside(task.decoder, block, run, samples, [target])
            run.hidden[samples] = seen[target]
        run.heads = None
        run.behind_attention = True


def count_expert_tokens(
    task: CalibrationTask, block: int, run: BlockRun, batch_size: int
) -> tuple[list[int], int]:
    """Return how many tokens each expert receives, and how many there are, of all processes."""
    experts = len(run.tensors[expert_weights(task.decoder.layout(block))[0]])
    counts = torch.zeros(experts + 1, dtype=torch.float64, device=task.decoder.device)
    for x, chosen in _batches(task, block, run, batch_size):
        flat = chosen.flatten()
        counts.index_add_(0, flat, counts.new_ones(len(flat)))
        counts[experts] += len(x)
    *of_experts, tokens = (int(count) for count in sum_over_processes(counts).tolist())
    return of_experts, tokens


def _batches(
    task: CalibrationTask, block: int, run: BlockRun, batch_size: int
) -> Iterator[tuple[Float[Tensor, "n in"], Int[Tensor, "n k"]]]:
    """Yield what the experts of a block multiply with, and which of them each token goes to."""
    decoder = task.decoder
    for begin in range(0, len(run.hidden), batch_size):
        hidden = to_device(run.hidden[begin : begin + batch_size], decoder.device)
        with forward_precision(decoder.device):
            attention = run.attention_output(slice(begin, begin + batch_size), hidden)
            x, chosen = decoder.expert_inputs(
                block, hidden, run.tensors, run.activations, attention
            )
        yield (x if run.activations is None else fake_quantize_tokens(x, run.activations)), chosen


def collect_expert_moments(
    of_block: ExpertPass, name: str, experts: range
) -> Float[Tensor, "experts in in"]:
    """Return H_e of some experts, filled up where they have few tokens, of all processes, float64.

    Args:
        of_block: The block.
        name: Weight whose inputs are asked for.
        experts: Which experts.
    """
    weight = of_block.run.tensors[name]
    inputs, device = weight.shape[-1], of_block.task.decoder.device
    second = torch.zeros(len(experts), inputs, inputs, dtype=torch.float64, device=device)
    missing = [max(0, TOKENS_PER_INPUT * inputs - of_block.counts[expert]) for expert in experts]
    shares = [lacking / of_block.tokens for lacking in missing]
    reader = _Reader(of_block, name)

    for x, chosen in _batches(of_block.task, of_block.block, of_block.run, of_block.batch_size):
        rows = rows_of_experts(chosen, len(weight))
        inputs_of_all = reader.common(x)
        everyone = None
        for expert, total, share in zip(experts, second, shares, strict=True):
            total += reader.gram(inputs_of_all[rows[expert]], expert)
            if share:
                # All tokens are alike for all experts in front of gate and up.
                if everyone is None or not reader.is_shared:
                    everyone = reader.gram(inputs_of_all, expert)
                total.add_(everyone, alpha=share)
    return sum_over_processes(second)


def rows_of_experts(chosen: Int[Tensor, "n k"], experts: int) -> Sequence[Int[Tensor, " n_e"]]:
    """Return the numbers of the tokens that each expert receives; the host waits once for their sizes."""
    flat = chosen.flatten()
    sizes = flat.new_zeros(experts).index_add_(0, flat, torch.ones_like(flat)).tolist()
    return (flat.argsort(stable=True) // chosen.shape[1]).split(sizes)


class _Reader:
    """Makes what an expert's weight reads of the tokens in front of the experts.

    Attributes:
        is_shared: Whether a token is the same for every expert: it is in front of gate and up.
    """

    def __init__(self, of_block: ExpertPass, name: str) -> None:
        self._of_block = of_block
        self._decoder = of_block.task.decoder
        gate_up, _ = expert_weights(self._decoder.layout(of_block.block))
        self._gate_up = of_block.run.tensors[gate_up]
        self.is_shared = name == gate_up
        weight = of_block.run.tensors[name]
        self._dtype = torch.promote_types(weight.dtype, torch.float32)

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
        activations = self._of_block.run.activations
        with forward_precision(self._decoder.device):
            product = torch.nn.functional.linear(x, self._gate_up[expert])
            inner = self._decoder.gate_experts(self._of_block.block, product)
        return inner if activations is None else fake_quantize_tokens(inner, activations)


def _round_weight_(
    of_block: ExpertPass, name: str, weight: Float[Tensor, "experts out in"]
) -> list[int]:
    """Round one weight of all experts, in place; return the experts whose inputs are all zero.

    Args:
        of_block: The block.
        name: The weight.
        weight: What is rounded.
    """
    task = of_block.task
    linear = task.learnables[of_block.block].linear(name)
    at_once = max(1, EXPERT_MOMENT_BYTES // (8 * weight.shape[-1] ** 2))
    rounded, unread = [], []
    for begin in range(0, len(weight), at_once):
        experts = range(begin, min(begin + at_once, len(weight)))
        moments = collect_expert_moments(of_block, name, experts)

        # One wait for all experts of the pass.
        activities = moments.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
        if not all(map(math.isfinite, activities)):
            raise NonFiniteError(
                f"block {of_block.block}: the inputs of {name} are not finite; "
                "use an intact model, or one that fits the type it computes in"
            )

        # Without any activity no code is better than another.
        for expert, moment, activity in zip(experts, moments, activities, strict=True):
            if activity == 0:
                unread.append(expert)
                rounded.append(quantize_weight(weight[expert].float(), linear.fmt))
            else:
                rounded.append(round_expert(weight[expert], moment, linear.fmt))

    # From here on the quantized model computes with what was rounded.
    linear.closed_form = stack_experts(rounded)
    dtype = stream_dtype(task.decoder.device, weight.dtype)
    of_block.run.tensors[name] = torch.stack([expert.dequantize().to(dtype) for expert in rounded])
    return unread


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
