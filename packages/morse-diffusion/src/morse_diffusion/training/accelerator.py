"""accelerate on the device that the user chose."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from effml_common.errors import InputError


def accelerator_on(device: torch.device, precision: str = "no") -> Accelerator:
    """Set up accelerate to compute on a device.

    Among several processes every one computes on its own card of the device's kind.

    Args:
        device: As ``resolve_device`` gives it.
        precision: ``no`` or ``bf16``.

    Raises:
        InputError: If accelerate was launched for another kind of device.
    """
    # accelerate keeps the first precision and device of a process; a process group stays what it is.
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=is_alone)
    chosen = {"ACCELERATE_TORCH_DEVICE": str(device)} if is_alone else {}
    with patch_environment(**chosen):
        accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")

    kind = accelerator.device.type
    if kind != device.type:
        raise InputError(f"accelerate was launched for {kind}, not {device}; add --device {kind}")
    return accelerator
