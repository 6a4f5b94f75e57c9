"""Perplexity as the literature measures it."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common.errors import NonFiniteError


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
    # The mean over each chunk, so that chunks weigh alike.
    losses = []
    for tokens in batches:
        predicted = logits(tokens)[:, :-1].float()
        following = tokens[:, 1:].to(predicted.device)
        # Flat: with the vocabulary in the middle, the CPU takes several times as long.
        of_tokens = torch.nn.functional.cross_entropy(
            predicted.flatten(0, 1), following.flatten(), reduction="none"
        )
        losses += of_tokens.view_as(following).mean(dim=1)

    # The mean over chunks; on the host, because not every device knows float64.
    mean = torch.stack(losses).cpu().double().mean().item()
    if not math.isfinite(mean):
        raise NonFiniteError("the model's cross-entropy is not finite; its weights are damaged")

    # A mean that is finite may still be too large for its exponential.
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
