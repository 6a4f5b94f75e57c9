"""Perplexity as the literature measures it."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from effml_common.errors import NonFiniteError

# Tokens whose cross-entropy is computed at once: with 262,144 words, each takes 1 MiB a copy.
PIECE = 256


@torch.no_grad()
def perplexity(
    logits: Callable[[Int[Tensor, "b t"]], Float[Tensor, "b t v"]],
    batches: Iterable[Int[Tensor, "b t"]],
) -> float:
    """Return exp of the mean over chunks of the mean cross-entropy of tokens 2..t of each chunk.

    Args:
        logits: The model, tokens to logits.
        batches: Chunks of equal length.

    Raises:
        NonFiniteError: If the model's outputs are not finite.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 100)
        >>> round(perplexity(uniform, [torch.arange(8)[None]]))
        100
    """
    losses = [chunk_losses(logits(tokens).split(PIECE, dim=1), tokens) for tokens in batches]
    return perplexity_of(torch.cat(losses))


@torch.no_grad()
def chunk_losses(
    pieces: Iterable[Float[Tensor, "b s v"]], tokens: Int[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """Return the mean cross-entropy of tokens 2..t of each chunk, in nats.

    Args:
        pieces: Logits of all t positions, from the first on, in pieces that need not exist at once.
        tokens: The chunks.
    """
    losses, position = [], 1
    for predicted in pieces:
        # What the last position predicts lies behind the chunk.
        following = tokens[:, position : position + predicted.shape[1]].to(predicted.device)
        predicted = predicted[:, : following.shape[1]].float()
        position += following.shape[1]
        # Flat: with the vocabulary in the middle, the CPU takes several times as long.
        of_tokens = cross_entropy(predicted.flatten(0, 1), following.flatten(), reduction="none")
        losses.append(of_tokens.view_as(following))
    return torch.cat(losses, dim=1).mean(dim=1)


def perplexity_of(losses: Float[Tensor, " chunks"]) -> float:
    """Return exp of the mean of the losses of all chunks, which weigh alike.

    Raises:
        NonFiniteError: If a loss is not finite.
    """
    # On the host, because not every device knows float64.
    mean = losses.cpu().double().mean().item()
    if not math.isfinite(mean):
        raise NonFiniteError("the model's cross-entropy is not finite; its weights are damaged")

    # A mean that is finite may still be too large for its exponential.
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
