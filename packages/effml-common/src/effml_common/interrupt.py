"""Stop a loop at a step boundary instead of in the middle of an update."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from effml_common.errors import Interrupted
from effml_common.logging import rank


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
        """Leave the loop if a signal arrived; call it at a step boundary, after saving.

        Raises:
            Interrupted: If SIGINT or SIGTERM arrived since the context was entered.
        """
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
