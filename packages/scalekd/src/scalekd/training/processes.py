"""The processes of one run: this one's device, and its place among those of torchrun."""

import os
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from effml_common.device import resolve_device
from effml_common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of torchrun."""

    rank: int = 0
    world: int = 1


def start_processes(device: str, stack: ExitStack) -> tuple[torch.device, Processes]:
    """The device, and this process's place among those that torchrun started.

    Raises:
        InputError: If the device is not there, or is of a kind that several processes cannot use.
    """
    where = resolve_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return where, Processes()
    if where.type not in ("cpu", "cuda"):
        raise InputError(
            f"device {where} trains in one process, not {world}; start without torchrun"
        )
    from torch import distributed

    backend = "nccl" if where.type == "cuda" and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend)
    stack.callback(distributed.destroy_process_group)
    return where, Processes(rank=distributed.get_rank(), world=world)
