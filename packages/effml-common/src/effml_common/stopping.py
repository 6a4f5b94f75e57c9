"""Stop a loop where nothing is lost: before an update with bad numbers, or between two updates."""

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from effml_common.errors import Interrupted, NonFiniteError
from effml_common.logging import rank


def check_finite(
    loss: Any, grad_norm: Any = None, *, step: int, term: str, last_good: Path | None = None
) -> None:
    """Check a loss and the gradient norm (numbers or scalar tensors) before they are used.

    With torch.distributed every rank must call this at the same step; then all raise together,
    whichever saw the bad number. The message names the ``term`` of the loss, the ``step`` that is
    about to be applied and the checkpoint to go back to.

    Raises:
        NonFiniteError: If either is NaN or infinite, on any rank.
    """
    named = {f"loss term {term}": loss, "gradient norm": grad_norm}
    values = {name: getattr(v, "item", lambda v=v: v)() for name, v in named.items()}
    bad = [f"{name} is {v}" for name, v in values.items() if v is not None and not math.isfinite(v)]
    if _some_rank(bool(bad)):
        what = " and ".join(bad) or f"loss term {term} or its gradient is bad on another rank"
        kept = f"last good checkpoint: {last_good}" if last_good else "no checkpoint yet"
        raise NonFiniteError(f"{what} at step {step} ({kept}); lower the learning rate")


def _some_rank(bad: bool) -> bool:
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return bad
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    fine = torch.tensor(int(not bad), device=device)
    distributed.all_reduce(fine, op=distributed.ReduceOp.MIN)
    return not fine.item()


class StopSignal:
    """Context that turns SIGINT and SIGTERM into a flag, for loops that stop when it is safe.

    A loop that finds ``requested`` saves, and then calls ``check``. A second signal of the same
    kind raises ``Interrupted`` at once. Outside the main thread, where Python allows no signal
    handler, the context does nothing.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the loop to stop."""
        return self._signum is not None

    def check(self) -> None:
        """Raise Interrupted if a signal arrived; call it at a step boundary, after saving."""
        if self._signum is not None:
            raise Interrupted(self._signum)

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
