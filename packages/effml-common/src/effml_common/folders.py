"""Where a command writes, whether a run may go on there, and where costly results are kept."""

import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effml_common.errors import CheckpointError, InputError
from effml_common.logging import jsonable


def run_folder(out: str | os.PathLike[str] | None, command: str) -> Path:
    """The folder of ``--out``, or ``runs/<command>-<time>``; call it before any work. Creates nothing.

    Raises:
        InputError: If there is a file in its place.
    """
    folder = Path(out or time.strftime(f"runs/{command}-%Y%m%d-%H%M%S"))
    check_out_folder(folder, (), resume=False)
    return folder


def check_out_folder(out: Path, results: Sequence[str], *, resume: bool) -> None:
    """Raise InputError if ``out`` is a file, or holds results of a run that is not to be resumed.

    ``results`` are names inside it that only a run writes, such as "student.safetensors".
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for --out")
    for name in results:
        if (out / name).exists() and not resume:
            remedy = "choose another --out, or add --resume auto"
            raise InputError(f"{out} holds {name} of an earlier run; {remedy}")


def check_same_settings(
    earlier: Mapping[str, Any], now: Mapping[str, Any], *, place: Path, free: Collection[str] = ()
) -> None:
    """Raise CheckpointError if a run is resumed with settings that would have given another result.

    ``earlier`` are those stored in ``place``, in JSON types, as which ``now`` is compared with them.
    The result does not depend on those named in ``free``.
    """
    now = jsonable(now)
    for name in dict.fromkeys((*now, *earlier)):
        old, new = earlier.get(name), now.get(name)
        if name not in free and old != new:
            remedy = "resume with the same settings, or choose another --out"
            raise CheckpointError(f"{place} was made with {name} {old}, not {new}; {remedy}")


def cache_folder(distribution: str) -> Path:
    """Folder of what a package keeps between runs: ``$XDG_CACHE_HOME/effml/<distribution>``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "effml" / distribution


def cache_key(settings: Any, libraries: Sequence[str]) -> str:
    """Name of a cached result: 16 hex digits of settings, in JSON types, and libraries' versions."""
    versions = {name: version(name) for name in libraries}
    text = json.dumps([settings, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
