"""Programs of subcommands, with one error line and the exit codes of all packages."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from effml_common.errors import (
    ConfigError,
    InputError,
    NonFiniteError,
    is_out_of_memory,
    memory_reason,
)
from effml_common.logging import jsonable, rank, set_quiet
from effml_common.parsing import COMMON_FLAGS, did_you_mean, one_line, parse

# Errors of the file system that come from what the user named, not from a fault of ours.
_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_DISK = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN)
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another disk"),
    **dict.fromkeys(_PATH, "check the path"),
    **dict.fromkeys(_DISK, "check the disk, or choose another one"),
    errno.EFBIG: "raise the limit (ulimit -f), or choose another disk",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions"),
}
_MEMORY_REMEDY = "lower the batch size or use a machine with more memory"


@dataclass(frozen=True)
class Command:
    """One subcommand; its modules are imported only when it is called.

    ``run`` returns a result: an object that rich can print, with a ``to_json()`` and, where it
    matters, an ``exit_code``.
    """

    name: str  # what the user types
    help: str  # one line for the list of commands
    config: str  # "module:Class" of the frozen keyword-only dataclass of its settings
    run: str  # "module:function" that takes the config
    examples: tuple[str, ...] = ()  # two worked command lines


def main(
    prog: str, distribution: str, commands: Sequence[Command], argv: Sequence[str] | None = None
) -> int:
    """Run one command line (default: that of this process) and return its exit code.

    0 done; 2 bad input; 3 a number was not finite; 130 or 143 interrupted; or the ``exit_code`` of
    the result. ``--version`` prints the version of ``distribution``.
    """
    # The common flags may stand anywhere, also before the command.
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {word for word in words if word in COMMON_FLAGS}
    rest = [word for word in words if word not in COMMON_FLAGS]
    set_quiet("--quiet" in flags)

    # Bad input ends in one line and an exit code; a fault of the program keeps its traceback.
    try:
        if rest[:1] in (["-h"], ["--help"]):
            print(_overview(prog, commands), flush=True)
        elif rest[:1] == ["--version"]:
            print(f"{prog} {metadata.version(distribution)}", flush=True)
        else:
            return _run(_find(prog, commands, rest), prog, rest[1:], "--json" in flags)
        return 0
    except SystemExit as stop:  # the help of a command
        return stop.code if isinstance(stop.code, int) else 0
    except (RuntimeError, ValueError, KeyboardInterrupt, OSError, MemoryError) as error:
        code, message = _outcome(error)
        if "--debug" in flags:
            traceback.print_exc()
        if message:
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
        return code


def _run(command: Command, prog: str, argv: Sequence[str], as_json: bool) -> int:
    name = f"{prog} {command.name}"
    config = parse(_resolve(command.config), argv, prog=name, examples=command.examples)
    # Libraries print on stdout as they please; only the result may appear there.
    with contextlib.redirect_stdout(sys.stderr):
        result = _resolve(command.run)(config)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sign that the terminal lacks is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    if rank() == 0 and as_json:
        print(json.dumps(jsonable(result.to_json()), allow_nan=False), flush=True)
    elif rank() == 0:
        from rich.console import Console

        Console().print(result)
        sys.stdout.flush()
    return getattr(result, "exit_code", 0)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and message; an error that is a fault of the program is raised again."""
    if isinstance(error, NonFiniteError | InputError):
        return 3 if isinstance(error, NonFiniteError) else 2, str(error)
    if is_out_of_memory(error):
        return 2, f"memory ran out ({memory_reason(error)}); {_MEMORY_REMEDY}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signum", signal.SIGINT), str(error) or "interrupted"
    if isinstance(error, BrokenPipeError):
        # The reader went away, as in "| head"; Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0, ""
    if isinstance(error, OSError) and error.errno in _ADVICE:
        path = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return 2, f"{path}{os.strerror(error.errno).lower()}; {_ADVICE[error.errno]}"
    raise error


def _find(prog: str, commands: Sequence[Command], rest: Sequence[str]) -> Command:
    names = [command.name for command in commands]
    choice = f"use one of {', '.join(names)}, or {prog} --help"
    if not rest:
        raise ConfigError(f"no command given; {choice}")
    if rest[0] not in names:
        raise ConfigError(f"there is no command {rest[0]}; {did_you_mean(rest[0], names, choice)}")
    return commands[names.index(rest[0])]


def _overview(prog: str, commands: Sequence[Command]) -> str:
    width = max((len(command.name) for command in commands), default=0)
    lines = [f"  {command.name:<{width}}  {command.help}" for command in commands]
    hints = f"{prog} COMMAND --help lists the settings of a command; {prog} --version the version."
    return "\n".join([f"usage: {prog} COMMAND [settings]", "", "commands:", *lines, "", hints])


def _resolve(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)
