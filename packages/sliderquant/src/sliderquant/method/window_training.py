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
from sliderquant.method.precision import forward_precision, is_accelerator
from sliderquant.method.sampling import all_reduce_, batches, own_share, select_samples, to_device

RETRIES = 2  # restarts of a window that diverged, each at half the learning rates
# Above this many weights in a window, its blocks are computed again in the backward pass.
RECOMPUTE_ABOVE = 2**24
ACCELERATOR_UPDATES_PER_READING = 8  # updates whose losses the host waits for together


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
        First and last loss as ``train_window`` returns them, and the number of restarts.

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
    rates = "lr_range" if settings["config"].method == "combined" else "lr_lora and lr_lwc"
    raise CalibrationDivergedError(
        f"blocks {window[0]}-{window[-1]} diverged at ratio {settings['ratio']} in {RETRIES + 1} "
        f"tries ({failure}); lower {rates}"
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
        on_update: Called with the loss of each update, in order; on an accelerator for several updates
            at a time.

    Returns:
        Mean loss of the first and of the last epoch; of the two halves of a single one.

    Raises:
        CalibrationDivergedError: If the loss or its gradient is not finite. On a CPU the update is not
            made; an accelerator may have made it, and some more, before the host knows.
    """
    # An optimizer of the window's own, with a rate for each kind of learnable.
    epochs = config.window_epochs // config.stages
    rate *= config.batch_size if config.lr_scale_by_batch else 1
    rates = [rate * lr for lr in (config.lr_lora, config.lr_lwc, config.lr_scale, config.lr_range)]
    trained = [learnables[block] for block in window]
    optimizer = window_optimizer(trained, rates, decoder.device)
    updates_per_epoch = -(-len(inputs) // config.batch_size)
    updates = epochs * updates_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: max(0, 1 - update / updates)
    )

    # Codes of weights that are rounded already wait packed, and are read in each update.
    for block_learnables in trained:
        block_learnables.unpack_codes(decoder.device)

    # Every epoch visits all samples once; under several processes, each computes its share.
    simulate = window_simulation(decoder, window, learnables, ratio, activations)
    relative = config.method == "combined"
    log = UpdateLog(decoder.device, on_update)
    for _, batch in batches(len(inputs), config.batch_size, epochs, seed):
        share = own_share(batch)
        x_q, wanted = (
            to_device(select_samples(hidden, share), decoder.device) for hidden in (inputs, targets)
        )
        log.add(
            *compute_gradients_(simulate, x_q, wanted, len(batch), trained, optimizer, relative)
        )
        optimizer.step()
        schedule.step()
    log.read()
    for block_learnables in trained:
        block_learnables.pack_codes()

    part = updates_per_epoch if epochs > 1 else -(-updates // 2)
    return sum(log.losses[:part]) / part, sum(log.losses[-part:]) / part


class UpdateLog:
    """Losses and gradient norms of the updates, read from an accelerator some updates at a time.

    Each reading waits until the device has caught up with the host.

    Args:
        device: Where they are computed; those of a CPU are read at once.
        on_update: Called with each loss.
    """

    def __init__(self, device: torch.device, on_update: Callable[[float], None]) -> None:
        self.losses: list[float] = []
        self._on_update = on_update
        self._unread: list[Tensor] = []
        self._reading_size = ACCELERATOR_UPDATES_PER_READING if is_accelerator(device) else 1

    def add(self, loss: Float[Tensor, ""], gradient_norm: Float[Tensor, ""]) -> None:
        """Take note of an update before it is made; read when enough are noted.

        Raises:
            CalibrationDivergedError: As ``read`` does.
        """
        self._unread.append(torch.stack([loss, gradient_norm]))
        if len(self._unread) == self._reading_size:
            self.read()

    def read(self) -> None:
        """Read what is noted.

        Raises:
            CalibrationDivergedError: If a loss or a gradient norm is not finite.
        """
        unread, self._unread = self._unread, []
        for loss, gradient_norm in torch.stack(unread).tolist() if unread else ():
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                raise CalibrationDivergedError(f"loss {loss}, gradient norm {gradient_norm}")
            self.losses.append(loss)
            self._on_update(loss)


def window_optimizer(
    learnables: Sequence[BlockLearnables], rates: Sequence[float], device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW for the learnables of a window; on CUDA one kernel updates many tensors.

    Args:
        learnables: Of the window's blocks.
        rates: Learning rates in the order of ``BlockLearnables.parameter_groups``.
        device: Where they are trained.
    """
    groups = [group for block in learnables for group in block.parameter_groups(*rates)]
    # ``None`` leaves the choice to torch.
    return torch.optim.AdamW(groups, weight_decay=0, fused=device.type == "cuda" or None)


def compute_gradients_(
    simulate: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "share t h"],
    targets: Float[Tensor, "share t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables],
    optimizer: torch.optim.Optimizer,
    relative: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute the gradients of a window's learnables, from this process's share of a batch.

    Nothing here waits for the device.

    Args:
        simulate: F^ of the window.
        inputs: x_q of this process's samples, of which there may be none.
        targets: F(x_fp) of the same samples, on the device that computes.
        batch_size: Samples of all processes together.
        learnables: Of the window's blocks.
        optimizer: Holds their parameters.
        relative: Divide a token's errors by the root mean square of its target. In language models a few
            tokens have hidden states a thousand times as large as all others, and would be all there is.

    Returns:
        Mean squared error over the whole batch, and the norm of its gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()

    # A process without a sample takes part in the sum with a zero, on the device of its gradients.
    loss = parameters[0].new_zeros(())
    if len(inputs):
        # At least float32, also where the hidden states are half as wide.
        simulated = simulate(inputs)
        error = simulated.to(torch.promote_types(simulated.dtype, torch.float32)) - targets
        if relative:
            size = targets.square().mean(dim=-1, keepdim=True).sqrt()
            error = error / torch.where(size > 0, size, 1.0)
        # The mean over the whole batch, of which this process may hold a part.
        loss = error.square().sum() / (batch_size * error[0].numel())
        loss.backward()
    batch_loss = all_reduce_(loss.detach(), parameters)

    # Nothing is learned for experts that see too few tokens.
    for block_learnables in learnables:
        block_learnables.mask_gradients_()
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    return batch_loss, norm


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
    # A large window keeps only the hidden states between its blocks for the backward pass, and on an
    # accelerator the simulated weights: to simulate them takes longer there than to multiply with them.
    frozen = {block: decoder.tensors(block) for block in window}
    weights = sum(tensor.numel() for tensors in frozen.values() for tensor in tensors.values())
    recompute = weights > RECOMPUTE_ABOVE
    keep_weights = not recompute or is_accelerator(decoder.device)

    def simulate_weights(block: int) -> dict[str, Tensor]:
        learnables[block].recompute = recompute
        return frozen[block] | learnables[block](frozen[block], ratio)

    def run(block: int, hidden: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
        simulated = simulate_weights(block) if weights is None else weights
        return decoder.run_block(block, hidden, simulated, activations)

    def simulate(hidden: Tensor) -> Tensor:
        with forward_precision(decoder.device):
            for block in window:
                kept = simulate_weights(block) if keep_weights else None
                if recompute:
                    hidden = checkpoint(
                        run, block, hidden, kept, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    hidden = run(block, hidden, kept)
        return hidden

    return simulate
