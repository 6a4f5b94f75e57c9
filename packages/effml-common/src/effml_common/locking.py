"""One run at a time in an out folder."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effml_common.errors import InputError
from effml_common.logging import rank, warn

LOCK = "run/lock"  # inside the out folder


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Hold an out folder for this process; only rank 0 does, for all of them.

    The system lets go of the lock when the process ends, however it ends. What the lock alone has
    brought into being is removed again: a run that is refused leaves no folder behind.

    Raises:
        InputError: If another process holds it.
    """
    if rank() > 0:
        yield
        return

    # Folders that are not there yet, the innermost first.
    path = out / LOCK
    new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    descriptor = _lock(path, out)
    try:
        yield
    finally:
        # Removed while it is held: who waits for no lock sees either this file or none.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        for folder in new:
            with contextlib.suppress(OSError):  # the run has written something into it
                folder.rmdir()


def _lock(path: Path, out: Path) -> int:
    """Open and lock the file; returns its descriptor."""
    import fcntl

    while True:
        # A run that ends now may remove the folder between these two lines.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"{out} is in use by another run; wait until it ends, or choose another --out"
            ) from None
        except OSError as error:  # some network file systems know no locks
            warn(f"{out} cannot be locked ({error.strerror}); start no second run in it")
            return descriptor

        # The run that held it may have removed the file in the meantime.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
