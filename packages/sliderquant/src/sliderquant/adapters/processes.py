"""Several processes under ``torchrun``: each computes a part of every batch, and none outlives it."""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from effml_common.device import resolve_device
from effml_common.errors import InputError
from sliderquant.adapters.reasons import reason_of

_SIGNAL_OF_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


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
        InputError: If the device is unknown or not there, or another process has ended early.
    """
    target = device_with_float64(device) if float64 else resolve_device(device)
    if started_processes() == 1 or distributed.is_initialized():
        yield target
        return
    _end_with_torchrun()
    on_gpu = target.type == "cuda"
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=target if on_gpu else None
        )
        try:
            yield target
        finally:
            distributed.destroy_process_group()
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", reason_of(error)).partition(". ")[0]
        raise InputError(
            f"another process of this run is gone ({reason}); "
            "see what it said last, and run again with --resume auto"
        ) from error


def wait_for_all() -> None:
    """Return when every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def _end_with_torchrun() -> None:
    """Ask the system for a SIGTERM when ``torchrun`` dies; a kill leaves it no time to send one.

    Processes that went on without it would hold the folder and the cards, and nobody would know.
    """
    # Other launchers may end while their processes work.
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENT, signal.SIGTERM)


def _lost_another(error: RuntimeError) -> bool:
    """Whether an error says that a message to or from another process failed."""
    # Gloo has no class of its own, but names the file that fails.
    return isinstance(error, distributed.DistError) or "third_party/gloo/" in str(error)
