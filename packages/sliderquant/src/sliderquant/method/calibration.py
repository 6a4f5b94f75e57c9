"""The calibration loop: activation relay, sliding windows, intra-layer stages.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). For a window W of blocks, with F the full-precision
and F^ the simulated blocks, the learnables of W minimise mean((F^(x_q) - F(x_fp))^2): x_fp enters the
window in the full-precision model, x_q in the model whose earlier blocks are quantized already. The
pair (x_q, x_fp) is that of the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effml_common.errors import NonFiniteError
from sliderquant.config import FULL_BITS, SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import Decoder
from sliderquant.method.error_compensation import round_blocks_
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.sampling import all_reduce_, batches, own_share, to_device
from sliderquant.method.windows import passes

RETRIES = 2
# Above this many weights in a window, its blocks are computed again in the backward pass.
RECOMPUTE_ABOVE = 2**24


class CalibrationDivergedError(NonFiniteError):
    """A window's loss became NaN or infinite and stayed so at lower learning rates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowResult:
    """How one window went.

    Attributes:
        step: Count of finished windows over all stages, from 1.
        ratio: Intra-layer ratio of the stage.
        window: Block numbers.
        first_loss: Mean squared error of the first epoch.
        last_loss: Mean squared error of the last epoch.
        retries: Restarts at half the learning rate.
    """

    step: int
    ratio: float
    window: list[int]
    first_loss: float
    last_loss: float
    retries: int


def activation_format(config: SliderConfig, ratio: float = 1.0) -> ActivationFormat | None:
    """Return how ``config`` rounds activations at an intra-layer ratio; ``None`` if it does not."""
    if config.abits == FULL_BITS:
        return None
    return ActivationFormat(
        bits=config.abits, sym=config.act_sym, attention=config.quantize_attention, ratio=ratio
    )


@torch.no_grad()
def run_blocks(
    decoder: Decoder,
    blocks: Sequence[int],
    hidden: Float[Tensor, "n t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables] | None = None,
    ratio: float = 1.0,
    activations: ActivationFormat | None = None,
    out: Float[Tensor, "n t h"] | None = None,
) -> Float[Tensor, "n t h"]:
    """Push hidden states through blocks, in full precision or simulated.

    Args:
        decoder: The model.
        blocks: Block numbers, in order.
        hidden: Hidden states entering the first block.
        batch_size: Samples per forward pass. The same value gives the same bits again.
        learnables: Of all blocks, for the simulated model; ``None`` for full precision.
        ratio: Intra-layer ratio of the simulation.
        activations: Rounding of activations in the simulation.
        out: Where to put the result; ``hidden`` itself makes it an update in place.

    Returns:
        ``out``, or a new tensor.
    """
    if out is None:
        out = torch.empty_like(hidden)
    if out is not hidden:
        out.copy_(hidden)
    for block in blocks:
        tensors = decoder.tensors(block)
        if learnables is not None:
            tensors = tensors | learnables[block](tensors, ratio)
        for part in out.split(batch_size):
            part.copy_(decoder.run_block(block, part, tensors, activations))
    return out


def train_window(
    decoder: Decoder,
    window: Sequence[int],
    learnables: Sequence[BlockLearnables],
    inputs: Float[Tensor, "n t h"],
    targets: Float[Tensor, "n t h"],
    *,
    ratio: float,
    config: SliderConfig,
    seed: tuple[int, ...],
    rate: float = 1.0,
    on_update: Callable[[float], None],
) -> tuple[float, float]:
    """Fit the learnables of one window to its targets, in place.

    AdamW without weight decay, learning rate falling linearly to zero, both made anew for the window.

    Args:
        decoder: The model; its own weights stay as they are.
        window: Block numbers.
        learnables: Of all blocks; those of ``window`` are trained.
        inputs: x_q, hidden states of the quantized model.
        targets: F(x_fp), output of the full-precision window.
        ratio: Intra-layer ratio of the stage.
        config: Epochs, batch size, learning rates.
        seed: Of the batch order.
        rate: Multiplier on the learning rates.
        on_update: Called after each update with its loss.

    Returns:
        Mean loss of the first and of the last epoch.

    Raises:
        CalibrationDivergedError: If the loss or its gradient is not finite; the update is not made.
    """
    epochs = config.epochs // config.stages
    rate *= config.batch_size if config.lr_scale_by_batch else 1
    rates = [rate * lr for lr in (config.lr_lora, config.lr_lwc, config.lr_scale)]
    trained = [learnables[block] for block in window]
    groups = [group for made in trained for group in made.parameter_groups(*rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    steps = epochs * -(-len(inputs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, 1 - step / steps))
    simulate = window_simulation(
        decoder, window, learnables, ratio, activation_format(config, ratio)
    )
    losses: list[list[float]] = [[] for _ in range(epochs)]
    for epoch, index in batches(len(inputs), config.batch_size, epochs, seed):
        mine = own_share(index)
        value = update_window(simulate, inputs[mine], targets[mine], len(index), trained, optimizer)
        schedule.step()
        losses[epoch].append(value)
        on_update(value)
    means = [sum(epoch) / len(epoch) for epoch in losses]
    return means[0], means[-1]


def update_window(
    simulate: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "part t h"],
    targets: Float[Tensor, "part t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Make one update of a window's learnables from this process's part of a batch.

    Args:
        simulate: F^ of the window.
        inputs: x_q of this process's samples, of which there may be none.
        targets: F(x_fp) of the same samples.
        batch_size: Samples of all processes together.
        learnables: Of the window's blocks.
        optimizer: Holds their parameters.

    Returns:
        Mean squared error over the whole batch.

    Raises:
        CalibrationDivergedError: If the loss or its gradient is not finite; the update is not made.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()

    # A process without a sample takes part in the sum with a zero, on the device of its gradients.
    loss = parameters[0].new_zeros(())
    if len(inputs):
        simulated = simulate(inputs)
        error = simulated - to_device(targets, simulated.device)
        # The mean over the whole batch, of which this process may hold a part.
        loss = error.square().sum() / (batch_size * error[0].numel())
        loss.backward()
    value = all_reduce_(loss.detach(), parameters)

    # Nothing is changed when a value is not finite.
    for made in learnables:
        made.mask_gradients_()
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if not (math.isfinite(value) and torch.isfinite(norm)):
        raise CalibrationDivergedError(f"loss {value}, gradient norm {norm.item()}")
    optimizer.step()
    return value


def window_simulation(
    decoder: Decoder,
    window: Sequence[int],
    learnables: Sequence[BlockLearnables],
    ratio: float,
    activations: ActivationFormat | None,
) -> Callable[[Tensor], Tensor]:
    """Return F^ of a window, as a function of the hidden states that enter it."""
    frozen = {block: decoder.tensors(block) for block in window}
    weights = sum(t.numel() for tensors in frozen.values() for t in tensors.values())
    recompute = weights > RECOMPUTE_ABOVE

    def run(block: int, hidden: Tensor) -> Tensor:
        learnables[block].recompute = recompute
        simulated = frozen[block] | learnables[block](frozen[block], ratio)
        return decoder.run_block(block, hidden, simulated, activations)

    def simulate(hidden: Tensor) -> Tensor:
        lean = {"use_reentrant": False, "preserve_rng_state": False}
        for block in window:
            hidden = checkpoint(run, block, hidden, **lean) if recompute else run(block, hidden)
        return hidden

    return simulate


def train_window_guarded(
    decoder: Decoder,
    window: Sequence[int],
    learnables: Sequence[BlockLearnables],
    inputs: Float[Tensor, "n t h"],
    targets: Float[Tensor, "n t h"],
    **settings: Any,
) -> tuple[float, float, int]:
    """Train a window; when it diverges, start it again at half the learning rate, twice at most.

    Returns:
        Mean loss of the first and the last epoch, and the number of restarts.

    Raises:
        CalibrationDivergedError: If the last retry diverges too; the learnables are as they were.
    """
    saved = [
        {name: value.clone() for name, value in learnables[block].state_dict().items()}
        for block in window
    ]
    for retry in range(RETRIES + 1):
        try:
            first, last = train_window(
                decoder, window, learnables, inputs, targets, rate=0.5**retry, **settings
            )
            return first, last, retry
        except CalibrationDivergedError as error:
            for block, values in zip(window, saved, strict=True):
                learnables[block].load_state_dict(values)
            failure = error
    raise CalibrationDivergedError(
        f"blocks {window[0]}-{window[-1]} diverged at ratio {settings['ratio']} in {RETRIES + 1} "
        f"tries ({failure}); lower lr_lora and lr_lwc"
    )


def calibrate(
    decoder: Decoder,
    tokens: Int[Tensor, "n t"],
    windows: Sequence[Sequence[int]],
    learnables: Sequence[BlockLearnables],
    config: SliderConfig,
    *,
    done: int = 0,
    on_update: Callable[[float], None] = lambda loss: None,
    on_window: Callable[[WindowResult], None] = lambda result: None,
    on_block: Callable[[int], None] = lambda block: None,
    on_experts: Callable[[int, Tensor], None] = lambda block, counts: None,
    cache: Callable[[str, Tensor], Tensor] = lambda name, hidden: hidden.clone(),
) -> None:
    """Train the learnables of all blocks, in place, window by window and stage by stage.

    With compensated rounding there are no windows: see ``error_compensation``.

    A run that stopped after ``done`` windows continues to the same bits: the relay up to there is
    replayed, which only needs the learnables, because blocks below a window's start are final.

    Args:
        decoder: The model; its own weights stay as they are.
        tokens: Calibration samples.
        windows: Block numbers per window, from ``make_windows``.
        learnables: One per block, fresh or restored.
        config: Method settings.
        done: Windows finished in an earlier run, counted over all stages.
        on_update: Called with the loss after each update.
        on_window: Called after each window and stage; the place to save.
        on_block: Called once per block, in order, when it is final, while it is still in memory.
        on_experts: Called with a block and the tokens that each of its experts received.
        cache: Given a name and hidden states, returns a copy of them that may live on disk.

    Raises:
        CalibrationDivergedError: Naming window and stage.
    """
    if not any(made.parameter_groups(0, 0) for made in learnables):
        for block in range(decoder.depth):  # all at full precision: nothing to do
            on_block(block)
        return
    if config.method == "compensated":
        round_blocks_(
            decoder,
            tokens,
            learnables,
            config.batch_size,
            activations=activation_format(config),
            on_block=on_block,
            cache=cache,
        )
        return
    step = 0
    order = passes(len(windows), config)
    for turns in order:
        last = turns is order[-1]
        if done >= step + len(turns) and not last:
            step += len(turns)
            continue
        # Blocks that a window has left behind are final for this pass, at its highest ratio.
        relay_ratio = (turns[-1][1] + 1) / config.stages
        relay_activations = activation_format(config, relay_ratio)
        embedded = decoder.block_inputs(tokens)
        x_fp, x_q = cache("x_fp", embedded), cache("x_q", embedded)
        del embedded
        targets, targets_of, relayed = None, None, 0
        for number, stage in turns:
            window = windows[number]
            for block in range(relayed, window[0]):
                if step < done:
                    decoder.hold([block])  # replayed: no window has loaded it
                run_blocks(decoder, [block], x_fp, config.batch_size, out=x_fp)
                run_blocks(
                    decoder, [block], x_q, config.batch_size, learnables, relay_ratio,
                    relay_activations, out=x_q,
                )  # fmt: skip
                if last:
                    on_block(block)
            relayed = max(relayed, window[0])
            step += 1
            if step <= done:
                continue
            decoder.hold(window)
            if targets_of != number:
                source = x_fp if config.target_input == "fp" else x_q
                targets = cache("targets", source)
                with decoder.counting_experts() as counts:
                    run_blocks(decoder, window, targets, config.batch_size, out=targets)
                _freeze_rare_experts(learnables, counts, config.min_expert_tokens, on_experts)
                targets_of = number
            first, loss, retries = train_window_guarded(
                decoder,
                window,
                learnables,
                x_q,
                targets,
                ratio=(stage + 1) / config.stages,
                config=config,
                seed=(config.seed, stage, number),
                on_update=on_update,
            )
            on_window(
                WindowResult(
                    step=step,
                    ratio=(stage + 1) / config.stages,
                    window=list(window),
                    first_loss=first,
                    last_loss=loss,
                    retries=retries,
                )
            )
        if last:
            for block in range(relayed, decoder.depth):
                on_block(block)


def _freeze_rare_experts(
    learnables: Sequence[BlockLearnables],
    counts: dict[int, Tensor],
    minimum: int,
    on_experts: Callable[[int, Tensor], None],
) -> None:
    """Leave experts untrained that calibration text hardly reaches: they would learn its noise."""
    for block, tokens in counts.items():
        if learnables[block].trained_experts is None:
            on_experts(block, tokens)
        learnables[block].trained_experts = tokens >= minimum
