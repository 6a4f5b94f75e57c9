"""The errors that a command turns into one line and an exit code.

Every message says what was wrong and what to do about it, separated by "; ".
"""

import signal


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

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("no memory of that"))
    (True, False)
    """
    # torch has a class of its own for devices only; its allocator on the host raises RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
