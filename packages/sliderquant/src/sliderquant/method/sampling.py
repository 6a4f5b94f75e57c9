"""Which samples a batch holds, and how several processes share it."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

from sliderquant.method.parallel import own_samples

HELD_OUT_SHARE = 8  # of so many samples, one is kept apart from the fit of the ridge regression


def held_out_samples(samples: int) -> int:
    """Return how many samples, the last ones, are held out: an eighth, at least one of two."""
    return min(samples // 2, -(-samples // HELD_OUT_SHARE))


def batches(
    samples: int, batch_size: int, epochs: int, seed: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (epoch, sample numbers), shuffled anew each epoch by a generator of its own."""
    generator = seeded(seed)
    for epoch in range(epochs):
        for index in torch.randperm(samples, generator=generator).split(batch_size):
            yield epoch, index


def seeded(numbers: tuple[int, ...]) -> torch.Generator:
    """Return a generator that depends on ``numbers`` (seed, stage, window): resuming needs no state."""
    state = 0
    for number in numbers:
        # Odd multiplier of splitmix64: neighbouring tuples get unrelated states.
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


def own_share(index: Int[Tensor, " b"]) -> Int[Tensor, " part"]:
    """Return this process's part of a batch: every n-th sample under n processes, else all."""
    return index[own_samples(len(index))]


def select_samples(
    hidden: Float[Tensor, "n t h"], index: Int[Tensor, " part"]
) -> Float[Tensor, "part t h"]:
    """Return a copy of some samples; unlike an index, their numbers need not go to a card first."""
    if len(index) == 0:
        return hidden[:0]
    return torch.stack([hidden[sample] for sample in index.tolist()])


def to_device(hidden: Float[Tensor, "..."], device: torch.device) -> Float[Tensor, "..."]:
    """Return hidden states on a device; those in the host's memory reach a card without a wait."""
    if device.type == "cuda" and hidden.device.type == "cpu" and torch.cuda.is_available():
        return hidden.pin_memory().to(device, non_blocking=True)
    return hidden.to(device)


def all_reduce_(loss: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Sum loss and gradients over all processes, in place; returns the summed loss."""
    if not distributed.is_initialized():
        return loss

    # One message for everything; a process without a sample takes part with zeros.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(flat)
    value, *sums = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))
    return value.squeeze(0)
