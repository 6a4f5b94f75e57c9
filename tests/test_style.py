"""What keeps the packages easy to enter: one tree in all of them, and functions with pauses."""

import importlib
import subprocess
import sys
import tomllib

import pytest

import style
from workspace import COMMON, ROOT, Member, members

METHODS = [member for member in members() if member.name != COMMON]
each_package = pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
each_method = pytest.mark.parametrize("member", METHODS, ids=lambda member: member.name)


@each_method
def test_a_package_has_the_tree_that_all_have(member: Member) -> None:
    wanted = ["__init__.py", "__main__.py", "cli.py", "config.py", "method", "adapters", "commands"]
    wanted += [f"demo/{name}.py" for name in ("data", "models", "arms", "report")]
    assert [name for name in wanted if not (member.source / name).exists()] == []
    assert [name for name in ("docs", "examples") if not (member.path / name).is_dir()] == []


@each_method
def test_each_command_is_the_function_of_a_file_named_for_its_verb(member: Member) -> None:
    for command in importlib.import_module(f"{member.module}.cli").COMMANDS:
        home = f"commands.{command.name.replace('-', '_')}"
        home = "demo.report" if command.name == "demo" else home
        assert command.run.partition(":")[0] == f"{member.module}.{home}"


@each_package
def test_long_functions_are_set_apart_in_phases(member: Member) -> None:
    functions = list(style.functions_of(member))
    dense = style.without_air(functions)
    long = [function for function in functions if function.lines > style.LONG_FUNCTION]
    assert long
    assert len(dense) <= style.MOST_WITHOUT_AIR * len(long), [f.place for f in dense]


@each_package
def test_functions_and_modules_keep_their_size(member: Member) -> None:
    functions = list(style.functions_of(member))
    assert [f.place for f in functions if f.lines > style.MOST_LINES_OF_A_FUNCTION] == []
    assert [f.place for f in functions if f.arguments > style.MOST_ARGUMENTS] == []
    lengths = {
        path.relative_to(member.path).as_posix(): len(path.read_text().splitlines())
        for path in member.source.rglob("*.py")
    }
    assert {k: n for k, n in lengths.items() if n > style.MOST_LINES_OF_A_MODULE} == {}


def test_what_counts_as_a_pause(tmp_path) -> None:
    body = "\n".join(f"    a{i} = {i}" for i in range(16))
    (tmp_path / "src" / "m").mkdir(parents=True)
    (tmp_path / "src" / "m" / "m.py").write_text(
        f'def dense():\n    """Doc.\n\n    More.\n    """\n{body}\n'
        f"def airy(a, *, b):\n{body}\n\n    return a\n"
        f'def quoting():\n    text = """\n\n"""\n{body}\n'
    )
    functions = list(style.functions_of(Member("m", tmp_path, "1", {}, "")))
    assert [f.lines for f in functions] == [16, 18, 19]
    assert [f.arguments for f in functions] == [0, 1, 0]
    assert [f.place.split()[1] for f in style.without_air(functions)] == ["dense", "quoting"]


@pytest.mark.parametrize("name", ["{}", "{}.cli"])  # documents of earlier versions say .cli
@each_method
def test_the_module_is_the_command(member: Member, name: str) -> None:
    command = [sys.executable, "-m", name.format(member.module), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    script = next(iter(member.scripts))
    assert (done.returncode, done.stdout) == (0, f"{script} {member.version}\n"), done.stderr


@pytest.mark.slow
@each_method
def test_accelerate_launch_runs_the_command(member: Member) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*launch, "-m", member.module, "--version"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert f" {member.version}\n" in done.stdout


def test_the_type_checker_reads_every_package() -> None:
    """A folder that it does not find is no error to it, so a pattern would check nothing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert "packages" in settings["include"]
    assert all((ROOT / folder).is_dir() for folder in settings["include"])


@pytest.mark.slow
def test_editors_know_the_types_of_all_public_names(tmp_path) -> None:
    """A user's file is checked as an editor checks it: no name may be unknown."""
    for member in METHODS:
        names = importlib.import_module(member.module).__all__
        lines = [f"import {member.module}", *(f"reveal_type({member.module}.{n})" for n in names)]
        (tmp_path / f"use_{member.module}.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    revealed = [line for line in done.stdout.splitlines() if ' is "' in line]
    expected = sum(len(importlib.import_module(m.module).__all__) for m in METHODS)
    assert len(revealed) == expected, done.stdout[-3000:]
    assert [line for line in revealed if line.endswith(('"Any"', '"Unknown"'))] == []
    assert " error: " not in done.stdout
