"""Training the learnables of one window of blocks.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). For a window W of blocks, with F the full-precision
and F^ the simulated blocks, the learnables of W minimise mean((F^(x_q) - F(x_fp))^2): x_fp enters the
window in the full-precision model, x_q in the model whose earlier blocks are quantized already. The
pair (x_q, x_fp) is that of the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effml_common.errors import NonFiniteError
from sliderquant.config import SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import Decoder
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.sampling import all_reduce_, batches, own_share, to_device

RETRIES = 2  # restarts of a window that diverged, each at half the learning rates
# Above this many weights in a window, its blocks are computed again in the backward pass.
RECOMPUTE_ABOVE = 2**24


class CalibrationDivergedError(NonFiniteError):
    """A window's loss became NaN or infinite and stayed so at lower learning rates."""


def train_window_guarded(
    decoder: Decoder,
    window: Sequence[int],
    learnables: Sequence[BlockLearnables],
    inputs: Float[Tensor, "n t h"],
    targets: Float[Tensor, "n t h"],
    **settings: Any,
) -> tuple[float, float, int]:
    """Train a window; when it diverges, start it again at half the learning rate, twice at most.

    Args:
        decoder: As for ``train_window``, and so are the others.
        window: Block numbers.
        learnables: Of all blocks.
        inputs: x_q, hidden states of the quantized model.
        targets: F(x_fp), output of the full-precision window.
        settings: Keyword arguments of ``train_window``.

    Returns:
        Mean loss of the first and the last epoch, and the number of restarts.

    Raises:
        CalibrationDivergedError: If the last retry diverges too; the learnables are as they were.
    """
    # What a restart starts from.
    initial_states = [
        {name: value.clone() for name, value in learnables[block].state_dict().items()}
        for block in window
    ]

    failure: CalibrationDivergedError | None = None
    for retry in range(RETRIES + 1):
        try:
            first_loss, last_loss = train_window(
                decoder, window, learnables, inputs, targets, rate=0.5**retry, **settings
            )
            return first_loss, last_loss, retry
        except CalibrationDivergedError as error:
            for block, state in zip(window, initial_states, strict=True):
                learnables[block].load_state_dict(state)
            failure = error
    raise CalibrationDivergedError(
        f"blocks {window[0]}-{window[-1]} diverged at ratio {settings['ratio']} in {RETRIES + 1} "
        f"tries ({failure}); lower lr_lora and lr_lwc"
    )


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
    activations: ActivationFormat | None = None,
    on_update: Callable[[float], None],
) -> tuple[float, float]:
    """Fit the learnables of one window to its targets, in place.

    The optimizer is AdamW without weight decay; the learning rate falls linearly to zero. Both start
    anew in every window.

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
        activations: How activations are rounded at that ratio; ``None`` if they are not.
        on_update: Called after each update with its loss.

    Returns:
        Mean loss of the first and of the last epoch.

    Raises:
        CalibrationDivergedError: If the loss or its gradient is not finite; the update is not made.
    """
    # An optimizer of the window's own, with a rate for each kind of learnable.
    epochs = config.epochs // config.stages
    rate *= config.batch_size if config.lr_scale_by_batch else 1
    rates = [rate * lr for lr in (config.lr_lora, config.lr_lwc, config.lr_scale)]
    trained = [learnables[block] for block in window]
    groups = [group for block in trained for group in block.parameter_groups(*rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    updates = epochs * -(-len(inputs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: max(0, 1 - update / updates)
    )

    # Every epoch visits all samples once; under several processes, each computes its share.
    simulate = window_simulation(decoder, window, learnables, ratio, activations)
    losses: list[list[float]] = [[] for _ in range(epochs)]
    for epoch, batch in batches(len(inputs), config.batch_size, epochs, seed):
        share = own_share(batch)
        wanted = to_device(targets[share], decoder.device)
        loss = update_window(simulate, inputs[share], wanted, len(batch), trained, optimizer)
        schedule.step()
        losses[epoch].append(loss)
        on_update(loss)
    epoch_means = [sum(epoch) / len(epoch) for epoch in losses]
    return epoch_means[0], epoch_means[-1]


def update_window(
    simulate: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "share t h"],
    targets: Float[Tensor, "share t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Update a window's learnables once, from this process's share of a batch.

    Args:
        simulate: F^ of the window.
        inputs: x_q of this process's samples, of which there may be none.
        targets: F(x_fp) of the same samples, on the device that computes.
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
        error = simulated - targets
        # The mean over the whole batch, of which this process may hold a part.
        loss = error.square().sum() / (batch_size * error[0].numel())
        loss.backward()
    batch_loss = all_reduce_(loss.detach(), parameters)

    # Nothing is changed when a value is not finite.
    for block_learnables in learnables:
        block_learnables.mask_gradients_()
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if not (math.isfinite(batch_loss) and torch.isfinite(norm)):
        raise CalibrationDivergedError(f"loss {batch_loss}, gradient norm {norm.item()}")
    optimizer.step()
    return batch_loss


def window_simulation(
    decoder: Decoder,
    window: Sequence[int],
    learnables: Sequence[BlockLearnables],
    ratio: float,
    activations: ActivationFormat | None,
) -> Callable[[Tensor], Tensor]:
    """Return F^ of a window, as a function of the hidden states that enter it.

    Args:
        decoder: The model.
        window: Block numbers.
        learnables: Of all blocks.
        ratio: Intra-layer ratio of the stage.
        activations: How activations are rounded; ``None`` if they are not.
    """
    # A large window keeps only the hidden states between its blocks for the backward pass.
    frozen = {block: decoder.tensors(block) for block in window}
    weights = sum(tensor.numel() for tensors in frozen.values() for tensor in tensors.values())
    recompute = weights > RECOMPUTE_ABOVE

    def run(block: int, hidden: Tensor) -> Tensor:
        learnables[block].recompute = recompute
        simulated = frozen[block] | learnables[block](frozen[block], ratio)
        return decoder.run_block(block, hidden, simulated, activations)

    def simulate(hidden: Tensor) -> Tensor:
        for block in window:
            if recompute:
                hidden = checkpoint(
                    run, block, hidden, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = run(block, hidden)
        return hidden

    return simulate
