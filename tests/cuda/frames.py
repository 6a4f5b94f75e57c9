"""Where in the code an operation was asked for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = ("counter.py", "costs.py", "fakes.py", "frames.py")
_SKIPPED = (_TORCH, "<", *(str(Path(__file__).with_name(name)) for name in _OURS))


def frames() -> Iterator[tuple[str, str, int]]:
    """File, function and line of the frames above, innermost first, without torch's and ours."""
    frame = sys._getframe(1)
    while frame is not None:
        # Comprehensions have frames of their own in some versions of Python and none in others.
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if not path.startswith(_SKIPPED) and not function.endswith("comp>"):
            yield path, function, frame.f_lineno
        frame = frame.f_back


def line() -> str:
    """The innermost frame that is not torch's, as "file.py:function"."""
    path, function, _ = next(frames(), ("torch", "backward", 0))
    return f"{path.rpartition(os.sep)[2]}:{function}"


def place() -> str:
    """The same with its folder and the number of the line."""
    return "{}:{}, line {}".format(*next(frames(), ("torch", "backward", 0)))


def inside_optimizer() -> bool:
    """Whether torch's optimizer asks: its step counts live on the host, also on a card."""
    frame = sys._getframe(1)
    while frame is not None:
        if f"{_TORCH}optim/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
