"""accelerate's engine: a precision on a device, in one process or several."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from effml_common.errors import ConfigError

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's words


def make_accelerator(precision: str, device: torch.device | None = None) -> Any:
    """Make an accelerator of a precision on a device.

    Among several processes (torchrun, accelerate launch) every one computes on its own card of the
    device's kind, over NCCL; on CPUs they talk over gloo.

    Args:
        precision: fp32, bf16 or fp16; auto is bf16 on a card that has it, else fp32.
        device: Where to compute; None leaves the choice to accelerate.

    Raises:
        ConfigError: If the device cannot do it, or accelerate was launched for another kind.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    # The scaler of fp16 is CUDA's.
    on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
    kind = "cpu" if on_cpu else "cuda" if device is None else device.type
    precision = resolve_precision(precision, kind)
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


def resolve_precision(precision: str, device_type: str) -> str:
    """Return the precision that ``auto`` stands for on a kind of device."""
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in TF32 on CUDA, and afterwards as before; elsewhere change nothing."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
