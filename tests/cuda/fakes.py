"""Where torch's fake device is not like a card: what passes there and must not, and its registration."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.cuda.costs import attention, tensors_in

aten = torch.ops.aten


class Misplaced(Exception):
    """Tensors of one operation are on two devices; the message names the line."""


class FakeMode(FakeTensorMode):
    """Touches no device, also on a machine with a card."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


class OneCallAttention(TorchFunctionMode):
    """Replaces attention that was imported by name before the counter was entered."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def device_of(name: str) -> torch.device:
    """The device that a counter is given, with its index.

    Raises:
        ValueError: If it is none of those that can be counted on.
    """
    name = {"cuda": "cuda:0", "gpu": "gpu:0"}.get(name, name) if isinstance(name, str) else ""
    if name.startswith("gpu:"):
        _register_gpu()
    elif name not in ("cpu", "meta") and not name.startswith("cuda:"):
        raise ValueError('the device must be "cuda:0", "gpu:0", "cpu" or "meta"')
    return torch.device(name)


def _register_gpu() -> None:
    """Register a device "gpu" in Python; torch allows it once in a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != "gpu":
        _setup_privateuseone_for_python_backend("gpu")
        # torch would take it for this machine's accelerator from now on, as in gradient checkpointing.
        torch.gpu.is_available = lambda: False  # pyright: ignore[reportAttributeAccessIssue]


def mixes_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that the fake mode lets pass has tensors, or a generator, on two devices."""
    name = func._schema.name.split("::")[1]
    devices = [_device(tensor) for tensor in tensors_in([*args, *kwargs.values()]) if tensor.dim()]

    # The fake mode looks neither into custom operations nor into lists that are changed in place.
    lists = name.startswith(("_foreach_", "_fused_")) and not name.startswith("_foreach_copy_")
    if (func.namespace not in ("aten", "prim", "prims") or lists) and len(set(devices)) > 1:
        return True
    # A table of the host is not looked up with indices of the device.
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        table = _device(args[0])
        indices = [_device(index) for index in tensors_in([args[1]])]
        return table.type == "cpu" and any(index != table for index in indices)
    generator = kwargs.get("generator")
    if generator is not None:
        target = kwargs.get("device") or (devices[0] if devices else torch.device("cpu"))
        return generator.device.type != torch.device(target).type
    return False


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def optimizer_patches(kind: str) -> list[Any]:
    """A card's default in optimizers: one operation on a whole list of tensors."""
    lists = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    patches = []
    for module in (foreach_utils, sys.modules["torch.optim.optimizer"]):
        for name in lists:
            kinds = [*getattr(module, name)(), kind]
            patches.append(mock.patch.object(module, name, return_value=kinds))
        types = [*module._foreach_supported_types, FakeTensor]
        patches.append(mock.patch.object(module, "_foreach_supported_types", types))
    return patches


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Keep collections from walking what the libraries hold: a tenth of the time."""
    frozen_before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()
