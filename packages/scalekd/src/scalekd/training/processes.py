"""The processes of one run: this one's device, and its place among those that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from effml_common.device import resolve_device
from effml_common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run.

    Attributes:
        device: Where this process computes.
        rank: Number of this process, from 0.
        world: Number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1


def this_process(device: str) -> Processes:
    """Find the device for a command that runs in one process.

    Raises:
        InputError: If the device is not there.
    """
    return Processes(device=resolve_device(device))


@contextmanager
def start_processes(device: str) -> Iterator[Processes]:
    """Find the device and join the other processes; leave them at the end.

    Args:
        device: As ``--device`` takes it.

    Raises:
        InputError: If the device is not there, or is of a kind that several processes cannot use.
    """
    own_device = resolve_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device=own_device)
        return
    if own_device.type not in ("cpu", "cuda"):
        raise InputError(
            f"device {own_device} trains in one process, not {world}; start without torchrun"
        )

    # Gradients travel by NCCL between cards, by gloo otherwise.
    from torch import distributed

    nccl = own_device.type == "cuda" and distributed.is_nccl_available()
    distributed.init_process_group("nccl" if nccl else "gloo")
    try:
        yield Processes(device=own_device, rank=distributed.get_rank(), world=world)
    finally:
        distributed.destroy_process_group()
