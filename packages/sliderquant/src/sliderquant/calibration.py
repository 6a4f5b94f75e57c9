"""The calibration loop: activation relay, sliding windows, intra-layer stages.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). For a window W of blocks, with F the full-precision
and F^ the simulated blocks, the learnables of W minimise mean((F^(x_q) - F(x_fp))^2): x_fp enters the
window in the full-precision model, x_q in the model whose earlier blocks are quantized already. The
pair (x_q, x_fp) and the order of the two loops (stages outside, windows inside, each stage one pass
over the whole network) are those of the authors' code; the paper's text nests them the other way round.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common.errors import NonFiniteError
from sliderquant.config import SliderConfig
from sliderquant.learnables import BlockLearnables

RETRIES = 2


class Decoder(Protocol):
    """What calibration needs to know of a language model (see ``adapters``)."""

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        ...

    def block_inputs(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t h"]:
        """Return the hidden states that enter block 0."""
        ...

    def linear_weights(self, block: int) -> dict[str, Tensor]:
        """Return the weights [out, in] to quantize in one block, by parameter name."""
        ...

    def run_block(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "n t h"]:
        """Run one block, with some of its weights replaced if given."""
        ...


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


@torch.no_grad()
def run_blocks(
    decoder: Decoder,
    blocks: Sequence[int],
    hidden: Float[Tensor, "n t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables] | None = None,
    ratio: float = 1.0,
) -> Float[Tensor, "n t h"]:
    """Push hidden states through blocks, in full precision or simulated.

    Args:
        decoder: The model.
        blocks: Block numbers, in order; none returns ``hidden`` itself.
        hidden: Hidden states entering the first block.
        batch_size: Samples per forward pass. The same value gives the same bits again.
        learnables: Of all blocks, for the simulated model; ``None`` for full precision.
        ratio: Intra-layer ratio of the simulation.
    """
    for block in blocks:
        weights = None
        if learnables is not None:
            weights = learnables[block](decoder.linear_weights(block), ratio)
        hidden = torch.cat(
            [decoder.run_block(block, part, weights) for part in hidden.split(batch_size)]
        )
    return hidden


def batches(
    samples: int, batch_size: int, epochs: int, seed: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (epoch, sample numbers), shuffled anew each epoch by a generator of its own."""
    generator = seeded(seed)
    for epoch in range(epochs):
        for index in torch.randperm(samples, generator=generator).split(batch_size):
            yield epoch, index


def seeded(numbers: tuple[int, ...]) -> torch.Generator:
    """Return a generator made from ``numbers`` (seed, stage, window): resuming needs no state."""
    state = 0
    for number in numbers:
        # Odd multiplier of splitmix64: neighbouring tuples get unrelated states.
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


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
    groups = [
        group
        for block in window
        for group in learnables[block].parameter_groups(rate * config.lr_lora, rate * config.lr_lwc)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    steps = epochs * -(-len(inputs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, 1 - step / steps))
    losses: list[list[float]] = [[] for _ in range(epochs)]
    for epoch, index in batches(len(inputs), config.batch_size, epochs, seed):
        hidden = inputs[index]
        for block in window:
            weights = learnables[block](decoder.linear_weights(block), ratio)
            hidden = decoder.run_block(block, hidden, weights)
        loss = torch.nn.functional.mse_loss(hidden, targets[index])
        value = loss.item()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(p.grad for group in groups for p in group["params"])
        if not (math.isfinite(value) and torch.isfinite(norm)):
            raise CalibrationDivergedError(f"loss {value}, gradient norm {norm.item()}")
        optimizer.step()
        schedule.step()
        losses[epoch].append(value)
        on_update(value)
    means = [sum(epoch) / len(epoch) for epoch in losses]
    return means[0], means[-1]


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
) -> None:
    """Train the learnables of all blocks, in place, window by window and stage by stage.

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
        on_window: Called after each window; the place to save.

    Raises:
        CalibrationDivergedError: Naming window and stage.
    """
    embedded = decoder.block_inputs(tokens)
    for stage in range(config.stages):
        if done >= (stage + 1) * len(windows):
            continue
        ratio = (stage + 1) / config.stages
        x_fp = x_q = embedded
        relayed = 0
        for number, window in enumerate(windows):
            passed = range(relayed, window[0])
            x_fp = run_blocks(decoder, passed, x_fp, config.batch_size)
            x_q = run_blocks(decoder, passed, x_q, config.batch_size, learnables, ratio)
            relayed = window[0]
            step = stage * len(windows) + number + 1
            if step <= done:
                continue
            first, last, retries = train_window_guarded(
                decoder,
                window,
                learnables,
                x_q,
                run_blocks(decoder, window, x_fp, config.batch_size),
                ratio=ratio,
                config=config,
                seed=(config.seed, stage, number),
                on_update=on_update,
            )
            on_window(
                WindowResult(
                    step=step,
                    ratio=ratio,
                    window=list(window),
                    first_loss=first,
                    last_loss=last,
                    retries=retries,
                )
            )


def updates(windows: Sequence[Sequence[int]], samples: int, config: SliderConfig) -> int:
    """Return the number of optimizer updates of a whole calibration."""
    per_window = (config.epochs // config.stages) * -(-samples // config.batch_size)
    return config.stages * len(windows) * per_window
