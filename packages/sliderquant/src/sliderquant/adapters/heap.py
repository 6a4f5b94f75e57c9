"""How the C library gives memory back."""

import contextlib
import ctypes

LARGE_BLOCK = 2**20
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def return_large_blocks() -> None:
    """Make blocks of 1 MiB and more go back to the system when they are freed.

    By default glibc stops doing so for tensors up to 32 MiB, and the holes that they leave doubled
    the memory of a calibration. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
