"""Every package's command answers in the same way."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from effml_common.parsing import COMMON_FLAGS, parse
from workspace import members

COMMANDS = [(member, script) for member in members() for script in member.scripts]
each_command = pytest.mark.parametrize(
    ("member", "script"), COMMANDS, ids=[script for _, script in COMMANDS]
)


ENTRY_POINTS = {script: member.scripts[script] for member, script in COMMANDS}


def run_installed(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the console script, as a user's shell does."""
    command = [str(Path(sys.executable).with_name(script)), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def call(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the function behind the console script in this process, which is much faster."""
    module, _, function = ENTRY_POINTS[script].partition(":")
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), err.getvalue())


def subcommands(script: str) -> list[str]:
    block = call(script, "--help").stdout.partition("\ncommands:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  ([a-z][\w-]*)", block, re.MULTILINE)


def assert_one_error_line(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(r"error: .+; .+", lines[0])


@each_command
def test_help_answers_without_loading_torch(member, script: str) -> None:
    module, _, function = member.scripts[script].partition(":")
    code = (
        f"import sys; sys.argv = [{script!r}, '--help']\n"
        f"from {module} import {function}\n"
        f"try: {function}()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    # A second is the aim; ten leave room for a busy machine and a cold disk.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}")


@each_command
def test_version_is_that_of_the_package(member, script: str) -> None:
    done = run_installed(script, "--version")
    assert (done.returncode, done.stdout) == (0, f"{script} {member.version}\n")


@each_command
def test_demo_is_there(member, script: str) -> None:
    assert "demo" in subcommands(script)


@each_command
def test_help_of_each_subcommand_shows_two_worked_examples(member, script: str) -> None:
    for name in subcommands(script):
        done = call(script, name, "--help")
        assert done.returncode == 0, done.stderr
        examples = done.stdout.partition("\nexamples:\n")[2]
        assert len(re.findall(rf"^ +{script} {name}\b", examples, re.MULTILINE)) >= 2, name


@each_command
def test_worked_examples_are_accepted_as_written(member, script: str) -> None:
    module = importlib.import_module(member.scripts[script].partition(":")[0])
    for command in module.COMMANDS:
        home, _, name = command.config.partition(":")
        config_class = getattr(importlib.import_module(home), name)
        for example in command.examples:
            words = [word for word in shlex.split(example) if word not in COMMON_FLAGS]
            assert words[:2] == [script, command.name]
            config = parse(config_class, words[2:], prog=" ".join(words[:2]))
            assert isinstance(config, config_class)


@each_command
def test_an_unknown_flag_is_one_line_of_what_and_what_to_do(member, script: str) -> None:
    for name in subcommands(script):
        assert_one_error_line(call(script, name, "--no-such-flag", "1"))


@each_command
def test_the_installed_command_answers_as_its_function_does(member, script: str) -> None:
    for words in (("--help",), ("demo", "--help"), ("demo", "--no-such-flag", "1")):
        installed, called = run_installed(script, *words), call(script, *words)
        assert installed.returncode == called.returncode
        assert installed.stdout.split() == called.stdout.split()
        assert installed.stderr == called.stderr


@each_command
@pytest.mark.parametrize("words", [(), ("no-such-command",), ("--no-such-flag",)], ids=str)
def test_an_unknown_command_is_one_line_of_what_and_what_to_do(
    member, script: str, words: tuple[str, ...]
) -> None:
    assert_one_error_line(call(script, *words))


@pytest.mark.timeout(90)  # the models that a demo trains first take minutes
@each_command
def test_a_file_in_place_of_the_out_folder_is_refused_before_any_work(
    member, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("kept")
    done = call(script, "demo", "--device", "cpu", "--out", str(tmp_path / "notes.txt"))
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: .+notes\.txt is a file; give a folder for --out", error)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "kept"
