"""Which device a command computes on: one rule, one set of messages for every package."""

import os
from typing import TYPE_CHECKING

from effml_common.errors import InputError
from effml_common.logging import say

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "auto (cuda, else cpu), cpu, cuda, cuda:N, mps or xpu"
_KINDS = ("cpu", "cuda", "mps", "xpu")


def resolve_device(name: str = "auto") -> "torch.device":
    """Turn a ``--device`` into a device that is there, make it current and name it on stderr.

    Under torchrun and accelerate, "auto" and "cuda" mean the card of this process (``LOCAL_RANK``).

    Raises:
        InputError: If torch does not know the device, or it is not there.
    """
    import torch

    # What the user means, as kind and index.
    kind, _, index = name.partition(":")
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in _KINDS or (":" in name and not index.isdecimal()):
        raise InputError(f"device {name!r} is unknown; use {DEVICE_HELP}")

    # Whether it is there. An mps device is the only one of its kind.
    backend = torch.backends.mps if kind == "mps" else torch.get_device_module(kind)
    count = getattr(backend, "device_count", lambda: 1)() if backend.is_available() else 0
    local_rank = os.environ.get("LOCAL_RANK", "0") if kind in ("cuda", "xpu") else "0"
    number = int(index or local_rank)
    if number >= count:
        there = f"{count} {kind} device{'s' * (count != 1)}" if count else f"no {kind} device"
        usable = f"use {kind}:{count - 1}" if count > 1 else f"use {kind}" if count else "use cpu"
        raise InputError(f"device {name} is not there (torch finds {there}); {usable}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if index and kind != "cpu" and processes > 1:
        raise InputError(f"device {name} is one card for {processes} processes; use {kind}")

    # Triton launches on the current card, whatever card the tensors are on.
    device = torch.device(kind, number) if kind in ("cuda", "xpu") else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    say(f"device: {device_name(device)}")
    return device


def device_name(device: "torch.device") -> str:
    """Device and, for a card, its product name: "cuda:0 (NVIDIA H100)"."""
    import torch

    is_card = device.type == "cuda"
    return f"{device} ({torch.cuda.get_device_name(device)})" if is_card else str(device)


def synchronize(device: "torch.device") -> None:
    """Wait until a device has done what was asked of it, so that a clock can be read."""
    import torch

    if device.type in ("cuda", "mps", "xpu"):
        torch.accelerator.synchronize(device)
