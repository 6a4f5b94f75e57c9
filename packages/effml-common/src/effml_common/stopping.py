"""Stop a loop where nothing is lost: before an update with bad numbers, or between two updates."""

import math
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from effml_common.errors import Interrupted, NonFiniteError
from effml_common.logging import rank

if TYPE_CHECKING:
    import torch

# Ranks add up their signals. One SIGTERM is more than SIGINT on all ranks of any run.
_SIGNAL_CODES = {signal.SIGINT: 1, signal.SIGTERM: 1 << 16}


def check_finite(
    loss: Any,
    grad_norm: Any = None,
    *,
    step: int,
    term: str,
    last_good: Path | None = None,
    stop: "StopSignal | None" = None,
) -> None:
    """Check a loss and the gradient norm (numbers or scalar tensors) before they are used.

    With torch.distributed every rank must call this at the same step; then all raise together,
    whichever saw the bad number. The message names the ``term`` of the loss, the ``step`` that is
    about to be applied and the checkpoint to go back to. With ``stop`` the ranks also agree, in the
    same reduction, whether a signal asks them to stop.

    Raises:
        NonFiniteError: If either is NaN or infinite, on any rank.
    """
    named = {f"loss term {term}": loss, "gradient norm": grad_norm}
    values = {name: getattr(v, "item", lambda v=v: v)() for name, v in named.items()}
    bad = [f"{name} is {v}" for name, v in values.items() if v is not None and not math.isfinite(v)]
    bad_ranks, code = _sum_over_ranks(len(bad), 0 if stop is None else stop.code)
    if stop is not None:
        stop.agree_on(code)
    if bad_ranks:
        what = " and ".join(bad) or f"loss term {term} or its gradient is bad on another rank"
        raise _non_finite(what, step, last_good)


def _non_finite(what: str, step: int, last_good: Path | None) -> NonFiniteError:
    kept = f"last good checkpoint: {last_good}" if last_good else "no checkpoint yet"
    return NonFiniteError(f"{what} at step {step} ({kept}); lower the learning rate")


def _ranks() -> int:
    """Return the number of ranks; 1 where torch, or its process group, is not in use."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def _sum_over_ranks(*numbers: int) -> Sequence[int]:
    if _ranks() == 1:
        return numbers
    import torch
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(numbers, device=device)
    distributed.all_reduce(total)
    return total.tolist()


class StopSignal:
    """Context that turns SIGINT and SIGTERM into a flag, for loops that stop when it is safe.

    A loop that finds ``requested`` saves, and then calls ``check``. A second signal of the same
    kind raises ``Interrupted`` at once. Outside the main thread, where Python allows no signal
    handler, the context does nothing.

    Among several ranks a signal counts once all have agreed on it, through ``agree``,
    ``check_finite`` or a ``StepMonitor``: otherwise one rank would leave and the others wait for it.
    """

    def __init__(self) -> None:
        self._signum: int | None = None  # that this process has received
        self._agreed: int | None = None  # that all ranks know of
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the loop to stop."""
        return self._obeyed() is not None

    def check(self) -> None:
        """Raise Interrupted if a signal arrived; call it at a step boundary, after saving.

        Ranks leave together, because a launcher ends all the others as soon as the first is gone.
        """
        signum = self._obeyed()
        if signum is None:
            return
        if _ranks() > 1:
            from torch import distributed

            distributed.barrier()
        raise Interrupted(signum)

    @property
    def code(self) -> int:
        """What this rank contributes to a sum that ``agree_on`` understands; 0 without a signal."""
        return 0 if self._signum is None else _SIGNAL_CODES[signal.Signals(self._signum)]

    def agree_on(self, code: float) -> None:
        """Take over the sum of all ranks' codes."""
        if code:
            is_term = code >= _SIGNAL_CODES[signal.SIGTERM]
            self._agreed = signal.SIGTERM if is_term else signal.SIGINT

    def agree(self) -> bool:
        """Ask all ranks, which must call this together; returns whether to stop."""
        self.agree_on(_sum_over_ranks(self.code)[0])
        return self.requested

    def _obeyed(self) -> int | None:
        return self._signum if _ranks() == 1 else self._agreed

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be named.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum == signum:
            raise Interrupted(signum, "stopped at once; the last complete checkpoint is intact")
        self._signum = signum
        if rank() == 0:
            # os.write, because a buffered stream may be in the middle of a write right here.
            os.write(2, b"stopping after this step; the same signal again stops at once\n")


@dataclass(frozen=True)
class Reading:
    """What the host knows of a step.

    Attributes:
        step: The step.
        values: Mean over ranks of each value.
    """

    step: int
    values: Mapping[str, float]


class StepMonitor:
    """Values, finiteness and stop signals of a step, in one reduction over all ranks on the device.

    ``judge`` never waits for the device. Its verdict can switch the update off there (``found_inf`` of
    fused optimizers), so that the weights stay as they were before the first bad step. ``read`` waits
    once, and brings to the host what has happened since.

    Args:
        device: Where the values are.
        stop: Signals that ranks agree on when they read.
        last_good: Checkpoint that an error names.

    Example:
        >>> import torch
        >>> monitor = StepMonitor(torch.device("cpu"))
        >>> float(monitor.judge(1, {"loss term mse": torch.tensor(0.5)}))
        0.0
        >>> monitor.read().values
        {'loss term mse': 0.5}
    """

    def __init__(
        self, device: "torch.device", stop: StopSignal | None = None, last_good: Path | None = None
    ) -> None:
        self.device, self.stop, self.last_good = device, stop, last_good
        self._names: tuple[str, ...] = ()
        self._step = 0
        self._latest: Any = None  # step, signals, values
        self._first_bad: Any = None  # the same of the first bad step
        self._is_bad: Any = None  # 1 from that step on
        self._reading: Reading | None = None

    def judge(self, step: int, values: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Join the values of all ranks.

        Args:
            step: The number of the update that is about to be made.
            values: Scalars on the device, under the same names at each step, causes before effects:
                an error names the first that is bad.

        Returns:
            A scalar on the device: 1.0 if a value of this step or an earlier one was NaN or infinite
            on any rank, else 0.0.
        """
        import torch

        # One vector, and one reduction where there are several ranks.
        world = _ranks()
        code = torch.full((), float(self.stop.code if self.stop else 0), device=self.device)
        means = [value.detach().float() / world for value in values.values()]
        vector = torch.stack([code, *means])
        if world > 1:
            torch.distributed.all_reduce(vector)

        # The first bad step is kept, because the host may look much later.
        latest = torch.cat([torch.full((1,), float(step), device=self.device), vector])
        is_bad = 1 - vector.isfinite().all().float()
        if self._is_bad is None:
            self._first_bad, self._is_bad = latest, is_bad
        else:
            self._first_bad = torch.where(self._is_bad > 0, self._first_bad, latest)
            self._is_bad = torch.maximum(self._is_bad, is_bad)
        self._names, self._step = tuple(values), step
        self._latest, self._reading = latest, None
        return self._is_bad

    def read(self) -> Reading:
        """Wait for the device, and return what the last step was.

        Raises:
            NonFiniteError: If a value of any step so far was NaN or infinite, on any rank.
        """
        import torch

        if self._reading is not None:
            return self._reading
        numbers = torch.cat([self._is_bad[None], self._first_bad, self._latest]).tolist()
        is_bad, first_bad, latest = numbers[0], *_halves(numbers[1:])
        if self.stop is not None:
            self.stop.agree_on(latest[1])
        if is_bad:
            named = zip(self._names, first_bad[2:], strict=True)
            bad = [f"{name} is {value}" for name, value in named if not math.isfinite(value)]
            raise _non_finite(bad[0], int(first_bad[0]), self.last_good)
        self._reading = Reading(self._step, dict(zip(self._names, latest[2:], strict=True)))
        return self._reading


def _halves(numbers: list[float]) -> tuple[list[float], list[float]]:
    return numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
