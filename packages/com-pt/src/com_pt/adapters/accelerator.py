"""accelerate's engine: a precision on a device, in one process or several."""

import os
from typing import Any

import torch

from effml_common.errors import ConfigError

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's words


def make_accelerator(precision: str, device: torch.device | None = None) -> Any:
    """Make an accelerator of a precision on a device.

    Among several processes (torchrun, accelerate launch) every one computes on its own card of the
    device's kind, over NCCL; on CPUs they talk over gloo.

    Args:
        precision: fp32, bf16 or fp16.
        device: Where to compute; None leaves the choice to accelerate.

    Raises:
        ConfigError: If the device cannot do it, or accelerate was launched for another kind.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    # The scaler of fp16 is CUDA's.
    on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise ConfigError("precision fp16 needs a GPU; use bf16 or fp32")

    # It keeps the first precision and device of a process; a process group stays what it is.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    if device is None:
        return Accelerator(mixed_precision=MIXED_PRECISION[precision])

    # Alone it takes exactly this device; among several each process has a card of its own.
    chosen = {"ACCELERATE_TORCH_DEVICE": str(device)} if alone else {}
    with patch_environment(**chosen):
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[precision], cpu=device.type == "cpu"
        )
    if accelerator.device.type != device.type:
        kind = accelerator.device.type
        raise ConfigError(f"accelerate was launched for {kind}, not {device}; add --device {kind}")
    return accelerator
