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
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
)
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
from tests.cuda.fakes import (
    FakeMode,
    Misplaced,
    OneCallAttention,
    device_of,
    frozen_garbage,
    mixes_devices,
    optimizer_patches,
)
from tests.cuda.frames import frames, inside_optimizer, line, place

aten = torch.ops.aten
_HOST_LIST, _TEXT = FakeTensor.tolist, FakeTensor.__repr__

# Neither a view nor a kernel: memory that nobody has written, and marks of the dispatcher.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "resize_"}
_NO_KERNEL |= {"new_empty_strided", "_unsafe_view", "lift", "lift_fresh", "set_"}
_NO_KERNEL |= {"unsqueeze_", "squeeze_", "t_", "transpose_", "unsafe_chunk", "unsafe_split"}
_INDEXED = LOOKUPS | SCATTERS | {"index_put"}
# Check their result on the host before they return.
_CHECKED = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "cholesky_inverse"}
_CHECKED |= {"_linalg_eigvals", "linalg_eig", "linalg_matrix_exp", "linalg_pinv", "histc"}


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
        self.device = device_of(device)
        self.allow = dict(allow or {})
        self.cost = Cost()
        self.active = False
        self._live: dict[int, int] = {}  # bytes of each storage that is alive
        self._total = 0

    def __enter__(self) -> "Counter":
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen_garbage())
            self.fake = FakeMode(allow_non_fake_inputs=self.device.type == "meta")
            # Where the device is meta its tensors need no fake; the host's small tensors stay real.
            if self.device.type != "meta":
                stack.enter_context(self.fake)
            stack.enter_context(_Dispatch(self))
            stack.enter_context(OneCallAttention())
            # Backward runs in this thread, so that its operations have a line too.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for patch in self._patches():
                stack.enter_context(patch)
            self._stack = stack.pop_all()
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
        """What asks the device without an operation: synchronizing, and reading or printing values."""
        return [
            mock.patch.object(F, "scaled_dot_product_attention", attention),
            mock.patch.object(torch.cuda, "synchronize", self._synchronize),
            mock.patch.object(torch.cuda.Event, "synchronize", self._synchronize),
            mock.patch.object(torch.accelerator, "synchronize", self._synchronize),
            mock.patch.object(FakeTensor, "tolist", lambda tensor: self._list(tensor)),
            mock.patch.object(FakeTensor, "__repr__", lambda tensor: self._text(tensor)),
            mock.patch.object(FakeTensor, "__format__", lambda tensor, _: self._text(tensor)),
            *optimizer_patches(self.device.type),
        ]

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

    def _text(self, tensor: Any) -> str:
        """Printing a tensor copies it to the host."""
        if self.active and self.on_device(tensor):
            self.answer(aten._local_scalar_dense.default, (tensor,))
        return _TEXT(tensor)

    def _synchronize(self, device: object = None) -> None:
        self.wait()

    def _watch(self, tensor: Tensor) -> None:
        """Follow a storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            weakref.finalize(storage, self._free, key).atexit = False
        # It may have been resized since.
        self._total += storage.nbytes() - self._live.get(key, 0)
        self._live[key] = storage.nbytes()
        if self.active:
            self.cost.peak = max(self.cost.peak, self._total)

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

        name = func._schema.name.split("::")[1]
        if name == "_foreach_copy_" and self.on_device(args[0][0]) != self.on_device(args[1][0]):
            for pair in zip(*args[:2], strict=True):
                self.record(aten.copy_.default, (*pair, *args[2:]), kwargs, pair[0])
            return

        # A copy between host and device; a blocking one waits, in both directions.
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if source is not None and self.on_device(source) != self.on_device(results[0]):
            direction = "to host" if self.on_device(source) else "to device"
            self.cost.copies[f"{direction} {line()}"] += 1
            # Into memory of the host that is not pinned a copy waits, whatever it was told.
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            into_host = name == "copy_" and self.on_device(source)
            if not non_blocking or (into_host and not hasattr(args[0], "is_pinned_here")):
                self.wait()
            return

        # Indices that live on the host are copied first; a check reads its result back.
        if name in _INDEXED and self.on_device(args[0]):
            for index in tensors_in(args[1:]):
                if isinstance(index, Tensor) and not self.on_device(index) and index.dim():
                    self.cost.copies[f"to device {line()}"] += 1
                    self.wait()
        if name in _CHECKED:
            self.wait()
        if name in _INDEXED - LOOKUPS and any(is_mask(i) for i in tensors_in([args[1]])):
            self.wait()

        # A launch: something on the device was written.
        written = [t for t in results if self.on_device(t) and t.numel()]
        written = written or [t for t in mutated(func, args, kwargs) if self.on_device(t)]
        if not written or is_view(func) or name in _NO_KERNEL or name == "_linalg_check_errors":
            return
        inputs = tensors_in([*args, *(kwargs[key] for key in kwargs if key != "out")])
        read, wrote = traffic(name, [t for t in inputs if self.on_device(t)], written)
        self.cost.read += read
        self.cost.written += wrote
        self.cost.launches[Launch(read + wrote, *work(func, args, kwargs, out, inputs))] += 1
        self.cost.lines[line()] += 1

    def answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Serve an operation whose result depends on values, if its place is allowed by name."""
        name = func._schema.name.split("::")[1]
        # Optimizers keep their step counts on the host, which has the device's name where that is fake.
        hosts = self.device.type in ("cpu", "meta") and inside_optimizer()
        counts = self.on_device(args[0]) and not hosts
        if counts:
            self.wait()
        places = [f"{Path(path).name}:{function}" for path, function, _ in frames()]
        key = next((each for each in places if each in self.allow), None)
        if key is None:
            raise HiddenWait(
                f"{name} needs a value of {self.device} at {place()}; "
                f'if it belongs there: allow={{"{line()}": VALUE}}'
            )
        value = self.allow[key]
        if callable(value):
            value = value(func, args)
        elif name == "nonzero":
            value = args[0].new_empty((int(value), args[0].dim()), dtype=torch.long)
        elif name == "index":
            value = func(args[0], rows_for_masks(args[1], int(value)))
        if isinstance(value, Tensor):
            self.record(func, args, {}, value)
        return value


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
            args[0].is_pinned_here = True
            return args[0]
        if torch.is_inference_mode_enabled():  # composite operations come whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten._local_scalar_dense.default and self.counter.on_device(args[0]):
            return self._scalar(func, args, kwargs)
        try:
            if mixes_devices(func, args, kwargs):
                raise Misplaced(f"{func} mixes devices at {place()}")
            out = func(*args, **kwargs)
        except FakeTensorDeviceMismatchError as error:
            raise Misplaced(f"{error} (at {place()})") from error
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
