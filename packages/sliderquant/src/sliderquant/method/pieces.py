"""Which parts of a weight are simulated at a time where memory is short."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sliderquant.method.precision import is_accelerator

# Weights that are simulated at a time where memory is short. A processor's piece stays in its cache; an
# accelerator, which pays for each operation, takes a layer at once and only the largest in parts.
WEIGHTS_PER_PIECE = 2**17
ACCELERATOR_WEIGHTS_PER_PIECE = 2**27


def row_pieces(shape: Sequence[int], device: torch.device) -> list[tuple[Any, ...]]:
    """Return the indices of a weight's pieces: blocks of rows; on an accelerator also of experts."""
    *experts, rows, columns = shape
    if is_accelerator(device) and experts:
        at_once = max(1, ACCELERATOR_WEIGHTS_PER_PIECE // (rows * columns))
        return [
            (slice(first, first + at_once), slice(None)) for first in range(0, experts[0], at_once)
        ]

    limit = ACCELERATOR_WEIGHTS_PER_PIECE if is_accelerator(device) else WEIGHTS_PER_PIECE
    at_once = max(1, limit // columns)
    blocks = [slice(first, first + at_once) for first in range(0, rows, at_once)]
    if not experts:
        return [(block,) for block in blocks]
    return [(expert, block) for expert in range(experts[0]) for block in blocks]


def views_of_piece(tensors: Sequence[Tensor | None], index: tuple[Any, ...]) -> list[Any]:
    """Return the views of (weight, A, B, u, l) that belong to a piece; all rows of an expert share A."""
    experts = index[:-1]
    return [
        None if tensor is None else tensor[experts] if position == 1 else tensor[index]
        for position, tensor in enumerate(tensors)
    ]
