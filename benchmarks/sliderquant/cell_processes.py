"""Studies of many cells: each cell runs in a process of its own and leaves one JSON file.

So libraries do not meet, peak memory is a cell's own, and a study that was stopped goes on where it was.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import say, set_quiet
from effml_common.parsing import COMMON_FLAGS, one_line, parse


def call_apart(
    function: Callable[..., Any], log: Path, *arguments: Any, preload: Sequence[str] = ()
) -> int:
    """Call a function in a process of its own that prints into ``log``; return its exit code.

    Args:
        function: At the top of a module.
        log: File for all that the function and its libraries print.
        arguments: Of the function.
        preload: Modules that a server imports once for all processes; none starts each from scratch.
    """
    context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    process = context.Process(target=_call_with_log, args=(function, log, arguments))
    process.start()
    process.join()
    return process.exitcode or 0


def _call_with_log(function: Callable[..., Any], log: Path, arguments: Sequence[Any]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    function(*arguments)


def run_cell(
    work: Callable[..., Any],
    config: Any,
    cell: Any,
    path: Path,
    log: Path,
    words: str,
    preload: Sequence[str] = (),
) -> None:
    """Run ``work(config, cell, path)`` apart, which writes the cell's file, and say how it ended."""
    begin = time.monotonic()
    code = call_apart(work, log, config, cell, path, preload=preload)
    if code:  # killed, or stopped by a library, before it could write down its error
        write_result(path, cell, {"error": f"the process ended with code {code}"})
    result = json.loads(path.read_text(encoding="utf-8"))
    ppl = ", ".join(f"{name} {value:.2f}" for name, value in result.get("ppl", {}).items())
    say(f"{words}: {result.get('error') or ppl or 'done'} ({time.monotonic() - begin:.0f} s)")


def result_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a cell measures; whatever a library raises is its result, and other cells go on."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def write_result(path: Path, cell: Any, result: Mapping[str, Any]) -> None:
    """Write a cell's file: what it is, and what came of it."""
    atomic_write(path, json.dumps({**asdict(cell), **result}, indent=1) + "\n")


def command(
    config_type: type, prog: str, examples: Sequence[str], run: Callable[[Any, list[str]], None]
) -> int:
    """Parse the flags and run a study; 2 on bad input, 130 when interrupted.

    Args:
        config_type: Settings, with ``cells``, ``out`` and ``threads``; ``cells`` is made.
        prog: How the command is called.
        examples: For its help.
        run: Gets the settings and the words of the command.
    """
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    set_quiet("--quiet" in sys.argv)
    try:
        config: Any = parse(config_type, words, prog=prog, examples=examples)
        for folder in (config.cells, config.out):
            if Path(folder).is_file():
                raise ConfigError(f"{folder} is a file; give a folder")
        Path(config.cells).mkdir(parents=True, exist_ok=True)

        # Nothing may look for a model hub, and processes inherit what is set here.
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        os.environ["PYTHONPATH"] = sys.path[0]  # where processes find our modules
        run(config, words)
    except (InputError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    return 0
