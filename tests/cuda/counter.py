"""Count what a GPU would do, without one: launches, bytes, FLOPs, peak memory, copies and waits.

Code runs inside :class:`Counter` on fake tensors, which have a shape, a type and a device but no values
(``torch._subclasses.FakeTensorMode``), so that models of published size cost no memory and take
milliseconds. A device mismatch raises, as on a card.

The device says what the run can show:

* ``cuda:0`` for forwards without gradients (backward on it needs a driver);
* ``gpu:0``, a device registered from Python, for training steps: mismatches raise, no autocast;
* ``cpu``, fake, for training steps under the CPU's bf16 autocast;
* ``meta`` for training steps with activation checkpointing; the host's tensors stay real.

What is counted:

* A **launch** is an operation on the device that is neither a view nor an allocation nor a mark of the
  dispatcher. One operation is one launch, also where a card would need two kernels.
* **Attention** (``F.scaled_dot_product_attention``) is one flash call, or one memory-efficient call with
  a mask or in float32; causal attention counts half of the FLOPs.
* **Bytes** are those of the arguments and results; a lookup reads what it returns, not its whole table.
* **Peak memory** is that of all live storages on the device, those placed before counting included.
* A **wait** is a point where the host stands still until the device is done: ``.item()`` and its kind,
  sizes that depend on values, blocking copies, ``synchronize`` and the error checks of ``torch.linalg``.
"""

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.cuda.costs import (
    LOOKUPS,
    SCATTERS,
    Cost,
    Launch,
    attention,
    is_mask,
    is_view,
    mutated,
    rows_for_masks,
    tensors_in,
    traffic,
    work,
)
from tests.cuda.frames import frames, inside_optimizer, line

aten = torch.ops.aten
_HOST_LIST = FakeTensor.tolist

# Neither a view nor a kernel: memory that nobody has written, and marks of the dispatcher.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "resize_"}
_NO_KERNEL |= {"new_empty_strided", "_unsafe_view", "lift", "lift_fresh", "_pin_memory", "set_"}
# Check their result on the host before they return.
_CHECKED = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "cholesky_inverse"}


class HiddenWait(Exception):
    """The host needs a value that the device has not computed; the message names the line."""


class Counter:
    """Run code on a fake device and count what it costs.

    Args:
        device: The fake device: "cuda:0", "gpu:0", "cpu" or "meta" (see the module).
        allow: Waits that a fake run cannot serve, as "file.py:function" of any frame on the stack,
            and what each returns: a number for ``.item()``, a number of rows for ``nonzero`` and
            boolean indexing, or a function of (operation, arguments).

    Example:
        >>> with Counter("cuda:0") as counter:
        ...     model = counter.module(lambda: nn.Linear(8, 4))
        ...     x = torch.randn(2, 8, device="cuda:0")
        ...     with counter.counting():
        ...         _ = model(x)
        >>> counter.cost.launch_count, counter.cost.flops
        (1, {'float32': 128})
    """

    def __init__(self, device: str, allow: Mapping[str, Any] | None = None) -> None:
        if device.startswith("gpu"):
            _register_gpu()
        self.device = torch.device(device)
        self.allow = dict(allow or {})
        self.cost = Cost()
        self.active = False
        self._live: dict[int, int] = {}  # bytes of each storage that is alive
        self._total = 0

    def __enter__(self) -> "Counter":
        self._stack = contextlib.ExitStack()
        # A collection need not walk what the libraries hold: a tenth of the time.
        gc.freeze()
        self._stack.callback(gc.unfreeze)
        self.fake = _FakeMode(allow_non_fake_inputs=self.device.type == "meta")
        # Where the device is meta its tensors need no fake; the host's small tensors stay real.
        if self.device.type != "meta":
            self._stack.enter_context(self.fake)
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Attention())
        # Backward runs in this thread, so that its operations have a line too.
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for patch in self._patches():
            self._stack.enter_context(patch)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def module(self, make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """Build a module without memory and put its parameters and buffers on the fake device."""
        with _disable_current_modes():
            with torch.device("meta"):
                module = make()
            if dtype is not None:
                module = module.to(dtype)
            self._place(module)
        return module

    @contextlib.contextmanager
    def counting(self) -> Iterator[Cost]:
        """Count from zero; memory that is alive already belongs to the peak."""
        self.cost = Cost(peak=self._total)
        self.active = True
        try:
            yield self.cost
        finally:
            self.active = False

    def _place(self, module: nn.Module) -> None:
        placed: dict[int, Any] = {}  # tied parameters stay tied
        for child in module.modules():
            for table in (child._parameters, child._buffers):
                for name, value in table.items():
                    if value is not None:
                        if id(value) not in placed:
                            placed[id(value)] = self._placed(value)
                        table[name] = placed[id(value)]

    def _placed(self, value: Tensor) -> Tensor:
        copy = value.detach().to("meta")
        if self.device.type != "meta":
            copy = FakeTensor(self.fake, copy, self.device)
        self._watch(copy)
        if isinstance(value, nn.Parameter):  # marked as nn.Parameter does, without its detach
            copy.requires_grad_(value.requires_grad)._is_param = True
        return copy

    def _patches(self) -> list[Any]:
        """A card's defaults: fused lists of tensors in optimizers, and synchronize without one."""
        lists = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
        patches = [
            mock.patch.object(F, "scaled_dot_product_attention", attention),
            mock.patch.object(torch.cuda, "synchronize", self._synchronize),
            mock.patch.object(FakeTensor, "tolist", lambda tensor: self._list(tensor)),
        ]
        for module in (foreach_utils, sys.modules["torch.optim.optimizer"]):
            for name in lists:
                kinds = [*getattr(module, name)(), self.device.type]
                patches.append(mock.patch.object(module, name, return_value=kinds))
            types = [*module._foreach_supported_types, FakeTensor]
            patches.append(mock.patch.object(module, "_foreach_supported_types", types))
        return patches

    def on_device(self, value: object) -> bool:
        """Whether a value is a tensor on the counted device."""
        # A fake tensor's own field: asking for its device is an operation of its own.
        if isinstance(value, FakeTensor):
            return value.fake_device == self.device
        return isinstance(value, Tensor) and value.device == self.device

    def wait(self) -> None:
        """Count a wait of the host at the line that caused it."""
        if self.active:
            self.cost.waits[line()] += 1

    def _list(self, tensor: Any) -> Any:
        """One copy to the host, however many numbers it brings."""
        if not self.on_device(tensor):
            return _HOST_LIST(tensor)
        value = self.answer(aten._local_scalar_dense.default, (tensor,))
        with _disable_current_modes():
            return torch.full(tensor.shape, value).tolist()

    def _synchronize(self, device: object = None) -> None:
        self.wait()

    def _watch(self, tensor: Tensor) -> None:
        """Follow a storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._total += storage.nbytes()
        self.cost.peak = max(self.cost.peak, self._total)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add one operation that has run."""
        results = tensors_in(out if isinstance(out, list | tuple) else [out])
        for result in results:
            if self.on_device(result):
                self._watch(result)
        if not self.active:
            return

        # A copy between host and device; a blocking one waits, in both directions.
        name = func._schema.name.split("::")[1]
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if source is not None and self.on_device(source) != self.on_device(results[0]):
            direction = "to host" if self.on_device(source) else "to device"
            self.cost.copies[f"{direction} {line()}"] += 1
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if not non_blocking:
                self.wait()
            return

        # Indices that live on the host are copied first; a check reads its result back.
        if name in LOOKUPS | SCATTERS and self.on_device(args[0]):
            for index in tensors_in(args[1:]):
                if isinstance(index, Tensor) and not self.on_device(index) and index.dim():
                    self.cost.copies[f"to device {line()}"] += 1
                    self.wait()
        if name in _CHECKED:
            self.wait()
        if name in SCATTERS and any(is_mask(i) for i in tensors_in([args[1]])):
            self.wait()

        # A launch: something on the device was written.
        written = [t for t in results if self.on_device(t) and t.numel()]
        written = written or [t for t in mutated(func, args, kwargs) if self.on_device(t)]
        if not written or is_view(func) or name in _NO_KERNEL or name == "_linalg_check_errors":
            return
        inputs = tensors_in([*args, *kwargs.values()])
        read, wrote = traffic(name, [t for t in inputs if self.on_device(t)], written)
        self.cost.read += read
        self.cost.written += wrote
        self.cost.launches[Launch(read + wrote, *work(func, args, kwargs, out, inputs))] += 1
        self.cost.lines[line()] += 1

    def answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Serve an operation whose result depends on values, if its place is allowed by name."""
        name = func._schema.name.split("::")[1]
        counts = self.on_device(args[0]) and not inside_optimizer()
        if counts:
            self.wait()
        places = [f"{Path(path).name}:{function}" for path, function, _ in frames()]
        key = next((place for place in places if place in self.allow), None)
        if key is None:
            where = "{}:{}, line {}".format(*next(frames(), ("torch", "backward", 0)))
            raise HiddenWait(
                f"{name} needs a value of {args[0].device} at {where}; allow it by name"
            )
        value = self.allow[key]
        if callable(value):
            return value(func, args)
        if name == "nonzero":
            return args[0].new_empty((int(value), args[0].dim()), dtype=torch.long)
        if name == "index":
            return func(args[0], rows_for_masks(args[1], int(value)))
        return value


class _FakeMode(FakeTensorMode):
    """Touches no device, also where torch believes one to be there: a card, or the device "gpu"."""

    avoid_device_init = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


class _Dispatch(TorchDispatchMode):
    """Sees every operation before the fake mode does."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at every step of the host, so answered at once
        if func is aten._pin_memory.default:  # the fake mode has none
            return args[0]
        if func is aten._local_scalar_dense.default and self.counter.on_device(args[0]):
            return self._scalar(func, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self.counter.answer(func, args)
        self.counter.record(func, args, kwargs, out)
        return out

    def _scalar(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor made from a number lives on the host; any other value has to be allowed."""
        if args[0].device.type == "cpu":
            with contextlib.suppress(DataDependentOutputException):
                return func(*args, **kwargs)
        return self.counter.answer(func, args)


class _Attention(TorchFunctionMode):
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


def _register_gpu() -> None:
    """Register a device "gpu" in Python; torch allows it once in a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != "gpu":
        _setup_privateuseone_for_python_backend("gpu")
