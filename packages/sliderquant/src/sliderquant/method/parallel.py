"""What several processes under ``torchrun`` share: samples, sums over them, and rows of weights."""

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; the tensor itself if there is but one."""
    if not distributed.is_initialized():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def process_count() -> int:
    """Return the number of processes that compute together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own_samples(count: int) -> slice:
    """Return which of ``count`` samples this process computes: every n-th under n processes."""
    process = distributed.get_rank() if distributed.is_initialized() else 0
    return slice(process, count, process_count())


def own_columns(count: int) -> slice:
    """Return this process's part of ``count`` columns: all of them if it is alone."""
    if not distributed.is_initialized():
        return slice(0, count)
    width = _width(count)
    begin = min(count, distributed.get_rank() * width)
    return slice(begin, min(count, begin + width))


def gather_columns(part: Shaped[Tensor, "n own"], count: int) -> Shaped[Tensor, "n {count}"]:
    """Return the columns of all processes side by side.

    Args:
        part: Those of ``own_columns(count)``.
        count: Columns of all processes together.
    """
    if not distributed.is_initialized():
        return part

    # All messages have the same size; the last ones may be padded.
    padded = torch.nn.functional.pad(part, (0, _width(count) - part.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, padded)
    return torch.cat(parts, dim=1)[:, :count]


def _width(count: int) -> int:
    """Columns of a process."""
    return -(-count // distributed.get_world_size())
