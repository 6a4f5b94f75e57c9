"""Hidden states of the calibration samples, in memory or in memory-mapped files."""

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from effml_common.files import naming
from effml_common.logging import rank


class ActivationCache:
    """Copies hidden states into memory or into files; a context that removes its files.

    Args:
        folder: Where files are created; ``None`` keeps copies in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / f"rank-{rank()}"

    def __call__(self, name: str, hidden: Tensor) -> Tensor:
        """Return a copy of ``hidden``; a name that is used again takes the place of the first.

        Raises:
            OSError: If the disk has no room for it.
        """
        if self._folder is None:
            return hidden.clone()

        self._folder.mkdir(parents=True, exist_ok=True)
        # Unlinked first: an earlier tensor of that name may still be read from.
        path = self._folder / name
        path.unlink(missing_ok=True)
        _reserve(path, hidden.nbytes)
        mapped = torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return mapped.view(hidden.shape).copy_(hidden)

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has files in it, or it is gone
                self._folder.parent.rmdir()


def _reserve(path: Path, size: int) -> None:
    """Create a file that has its blocks: where a mapped one gets none, the system ends the process."""
    with naming(path), path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
