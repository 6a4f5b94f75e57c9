"""The errors that a command turns into one line and an exit code.

Every message says what was wrong and what to do about it, separated by "; ".
"""

import errno
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used (exit code 2)."""


class ConfigError(InputError):
    """A setting is unknown, of the wrong type or out of range."""


class CheckpointError(InputError):
    """A checkpoint cannot be written, or cannot be trusted."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient or an output became NaN or infinite (exit code 3)."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal at a safe place (exit code 128 + signum).

    Derived from KeyboardInterrupt, so that ``except Exception`` in a loop does not swallow it.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        name = signal.Signals(signum).name
        super().__init__(message or f"interrupted by {name}; run again with --resume auto")
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device did not suffice.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("out of memory"))
    (True, False)
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM

    # torch has a class of its own for devices only; its allocator on the host raises RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text
    )


@contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Say what to do when the memory runs out.

    Args:
        remedy: A clause that names the settings that matter, such as "lower --batch-size".

    Raises:
        InputError: If the body runs out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"memory ran out ({memory_reason(error)}); {remedy}") from error


def memory_reason(error: BaseException) -> str:
    """Return how much memory was asked for, in the words of the allocator."""
    # torch writes where it happened in front, and advice on its own settings behind.
    words = " ".join(str(error).split())
    match = re.search(r"[Tt]ried to allocate [\d.]+ \w+", words)
    return match[0].lower().replace("gib", "GiB").replace("mib", "MiB") if match else "no room"
