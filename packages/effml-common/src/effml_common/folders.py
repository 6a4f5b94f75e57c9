"""Where a command writes, and where it keeps what it would not like to compute twice."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def run_folder(out: str | os.PathLike[str] | None, command: str) -> Path:
    """The folder of ``--out``, or ``runs/<command>-<time>``; it is not created here."""
    return Path(out or time.strftime(f"runs/{command}-%Y%m%d-%H%M%S"))


def cache_folder(distribution: str) -> Path:
    """Folder of what a package keeps between runs: ``$XDG_CACHE_HOME/effml/<distribution>``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "effml" / distribution


def cache_key(settings: Any, libraries: Sequence[str]) -> str:
    """Name for a cached result: 16 hex digits that change with what the result depends on.

    That is ``settings``, in JSON types, and the versions of some distributions, ``libraries``.
    """
    versions = {name: version(name) for name in libraries}
    text = json.dumps([settings, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
