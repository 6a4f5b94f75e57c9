"""What a run says: lines and progress on stderr, numbers in ``metrics.jsonl``; rank 0 only."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from effml_common.errors import ConfigError
from effml_common.files import atomic_write

Sink = Callable[[int, Mapping[str, Any]], object]  # gets a step and its metrics
SINK_HELP = "module:function that gets (step, metrics) of every logged step, for a tracker"

_LINE_SECONDS = 10.0  # without a terminal, a log file should not fill with progress lines
_quiet = False


def rank() -> int:
    """Rank of this process as torchrun and accelerate announce it; 0 when there is only one."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


def set_quiet(quiet: bool) -> None:
    """Silence ``say`` and progress (not ``warn``), or let them speak again."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line on stderr, unless quiet."""
    if rank() == 0 and not _quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one warning line on stderr, even when quiet."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def jsonable(value: Any) -> Any:
    """Copy a value into plain JSON types; NaN and infinities, which JSON lacks, become strings."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # zero-dimensional tensors and numpy scalars
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def words(value: Any) -> str:
    """The text of a value: numbers with four digits, lists and mappings on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """Progress of one loop: a bar with the time left on a terminal, elsewhere a line now and then.

    Without a terminal a line appears at multiples of ``every`` steps, at most every ten seconds,
    and at the end. A bar that is opened while another is on screen stays silent.
    """

    _bar_on_screen = False  # whichever loop has it

    def __init__(self, description: str, total: int, every: int = 1) -> None:
        self._description, self._total, self._every = description, total, max(1, every)
        self._done = self._shown = 0
        self._fields: dict[str, Any] = {}
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = time.monotonic()
        self._next_line = self._start + _LINE_SECONDS
        self._speaks = rank() == 0 and not _quiet and not self._bar_on_screen
        if self._speaks and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TextColumn

            fields = TextColumn("{task.fields[fields]}", markup=False)
            columns = (*Progress.get_default_columns(), fields)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._description, total=self._total, fields="")
            self._bar.start()
            type(self)._bar_on_screen = True
        return self

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count ``n`` more steps and show ``fields``, such as the loss, beside them."""
        self._done += n
        self._fields.update(jsonable(fields))
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, fields=words(self._fields))
        elif self._done % self._every == 0 and self._next_line <= time.monotonic():
            self._line()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            type(self)._bar_on_screen = False
        elif self._done > self._shown:
            self._line()

    def _line(self) -> None:
        now, self._shown = time.monotonic(), self._done
        self._next_line, elapsed = now + _LINE_SECONDS, now - self._start
        left = elapsed / max(self._done, 1) * max(self._total - self._done, 0)
        share = f"{self._done}/{self._total} ({100 * self._done // max(self._total, 1)} %)"
        fields = f", {words(self._fields)}" if self._fields else ""
        if self._speaks:
            say(f"{self._description}: {share}{fields}, {elapsed:.0f} s elapsed, {left:.0f} s left")


def load_sink(address: str | None) -> Sink | None:
    """Return the function that ``module:function`` names; the module may stand in the working folder.

    Raises:
        ConfigError: If it cannot be imported, or is no function.

    Example:
        >>> load_sink("builtins:print")
        <built-in function print>
    """
    if address is None:
        return None
    module, _, name = address.partition(":")
    try:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        sink = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"sink {address} cannot be imported: {error}; give module:function"
        ) from error
    if not callable(sink):
        raise ConfigError(f"sink {address} is no function; give one that takes (step, metrics)")
    return sink


class RunLog:
    """Context that writes one JSON object per logged step to ``metrics.jsonl``.

    The file holds no clock time, so the same run twice, or a resumed run, gives the same file.
    Entering raises OSError if it cannot be written.

    Args:
        run_dir: Folder of the file, made if missing; None keeps no file.
        every: Step interval of progress lines where stderr is no terminal.
        sink: Called with (step, metrics), for any tracker.
        resume_step: Last step of an earlier run whose line is kept; None begins a new file.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        every: int = 10,
        sink: Sink | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._path = None if run_dir is None or rank() else run_dir / "metrics.jsonl"
        self._every, self._sink, self._resume_step = every, sink, resume_step
        self._file: Any = None
        self._progress: Progress | None = None

    def __enter__(self) -> "RunLog":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path, _lines_up_to(self._path, self._resume_step))
            self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; numbers, strings and zero-dimensional tensors are welcome."""
        plain = jsonable(metrics)
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
            self._file.flush()
        if self._sink is not None and rank() == 0:
            self._sink(step, metrics)
        if self._progress is not None:
            self._progress._fields.update(plain)

    def progress(self, description: str, total: int) -> Progress:
        """Progress of this run's loop; the metrics of the last ``log`` appear beside it."""
        self._progress = Progress(description, total, self._every)
        return self._progress


def _lines_up_to(path: Path, step: int | None) -> str:
    if step is None or not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by a kill
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    return "".join(kept)
