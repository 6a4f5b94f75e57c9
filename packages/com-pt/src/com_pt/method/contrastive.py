"""Symmetric cross-entropy of similarities that are never held as one matrix.

The logits of n queries and m keys are computed again in the backward pass, a block of queries at a time,
so that memory grows with n + m and not with n times m. The result is open_clip's ``ClipLoss``.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 24  # logits that are held at once: 64 MiB in float32


def contrastive_loss(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    bias: Tensor | None = None,
    *,
    offset: int = 0,
    symmetric: bool = True,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of ``scale * queries @ keys.T + bias``.

    Query i belongs to key i + offset. Both passes compute in the precision of the inputs, also within an
    autocast, because the second must find the logits of the first.

    Args:
        queries: Unit vectors.
        keys: Unit vectors; with ``symmetric`` as many as queries.
        scale: Already exponentiated.
        bias: Added to every logit.
        offset: Where this process's part of the keys begins.
        symmetric: Average it with the cross-entropy of the keys over the queries.

    Example:
        >>> pairs = torch.eye(3)
        >>> logits = 5.0 * pairs @ pairs.T
        >>> expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        >>> bool(torch.isclose(contrastive_loss(pairs, pairs, torch.tensor(5.0)), expected))
        True
    """
    bias = scale.new_zeros(()) if bias is None else bias
    with _without_autocast(queries.device.type):
        return _Contrastive.apply(queries, keys, scale, bias, offset, symmetric)  # pyright: ignore


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        symmetric: bool,
    ) -> Tensor:
        # Normalisers of every row and, over all blocks, of every column.
        rows = queries.new_empty(len(queries))
        columns = keys.new_full((len(keys),), -torch.inf) if symmetric else None
        for block in _blocks(queries, keys):
            logits = scale * queries[block] @ keys.T + bias
            rows[block] = logits.logsumexp(1)
            if columns is not None:
                columns = torch.logaddexp(columns, logits.logsumexp(0))

        # Minus the mean log-probability of the pairs.
        own = keys[offset : offset + len(queries)]
        matches = scale * (queries * own).sum(1) + bias
        loss = (rows - matches).mean()
        if columns is not None:
            loss = (loss + (columns - matches).mean()) / 2
        ctx.save_for_backward(queries, keys, scale, bias, rows, columns)
        ctx.offset = offset
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, keys, scale, bias, rows, columns = ctx.saved_tensors
        weight = gradient / len(queries) / (1 if columns is None else 2)
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(bias)

        # Softmax along rows and columns, minus one at the pairs, block by block.
        with _without_autocast(queries.device.type):
            for block in _blocks(queries, keys):
                similarities = queries[block] @ keys.T
                logits = scale * similarities + bias
                of_logits = (logits - rows[block, None]).exp_()
                if columns is not None:
                    of_logits += (logits - columns).exp_()
                pairs = of_logits[:, ctx.offset + block.start : ctx.offset + block.stop].diagonal()
                pairs -= 1 if columns is None else 2
                of_logits *= weight

                of_queries[block] = scale * (of_logits @ keys)
                if ctx.needs_input_grad[1]:
                    of_keys += scale * (of_logits.T @ queries[block])
                of_scale += (of_logits * similarities).sum()
                of_bias += of_logits.sum()
        return of_queries, of_keys, of_scale, of_bias, None, None


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch an autocast off, if there is one; not every device has it."""
    has_one = torch.amp.is_autocast_available(device_type)
    is_on = has_one and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def _blocks(queries: Tensor, keys: Tensor) -> list[slice]:
    """Return parts of the queries whose logits are ``BLOCK_ELEMENTS`` at most."""
    rows = max(1, BLOCK_ELEMENTS // max(1, len(keys)))
    return [slice(i, min(i + rows, len(queries))) for i in range(0, len(queries), rows)]
