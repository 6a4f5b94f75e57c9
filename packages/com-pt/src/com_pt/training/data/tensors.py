"""Batches as nests of tensors in tuples, lists and dicts."""

from typing import Any

import torch
from torch.utils import _pytree


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split every tensor of a batch into equal parts."""
    leaves, shape = _pytree.tree_flatten(batch)
    pieces = [leaf.chunk(parts) for leaf in leaves]
    return [_pytree.tree_unflatten([p[i] for p in pieces], shape) for i in range(parts)]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch to a device."""
    return _pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)
