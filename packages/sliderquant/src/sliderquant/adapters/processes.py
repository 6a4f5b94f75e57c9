"""Several processes under ``torchrun``: each computes a part of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from effml_common.device import resolve_device
from effml_common.errors import InputError


def device_with_float64(name: str) -> torch.device:
    """Resolve a ``--device`` for a computation in double precision, which mps lacks.

    Raises:
        InputError: If the device is unknown, not there or an mps device.
    """
    device = resolve_device(name)
    if device.type == "mps":
        raise InputError("device mps has no float64, which this command computes in; use cpu")
    return device


def started_processes() -> int:
    """Return how many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str, *, float64: bool = False) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did; yields this process's device.

    Gloo connects CPU processes, NCCL those with a GPU each.

    Args:
        device: As the user asked for it; "auto" and "cuda" mean the GPU of this process.
        float64: Whether the computation needs double precision.

    Raises:
        InputError: If the device is unknown or not there.
    """
    target = device_with_float64(device) if float64 else resolve_device(device)
    if started_processes() == 1 or distributed.is_initialized():
        yield target
        return
    on_gpu = target.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", device_id=target if on_gpu else None
    )
    try:
        yield target
    finally:
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()
