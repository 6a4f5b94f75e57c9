"""Packages import effml_common and never one another; inside one, imports go one way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workspace import COMMON, ROOT, members

METHODS = [member for member in members() if member.name != COMMON]
each_method = pytest.mark.parametrize(
    "member",
    [pytest.param(member, marks=[pytest.mark.slow] * (i > 0)) for i, member in enumerate(METHODS)],
    ids=lambda member: member.name,
)


def lint(folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    tool = Path(sys.executable).with_name("lint-imports")
    command = [tool, "--config", "pyproject.toml", "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources of all packages in one folder, to plant imports in."""
    for member in members():
        shutil.copytree(member.source, tmp_path / member.module)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_its_import_boundaries() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@each_method
def test_effml_common_importing_a_package_is_caught(copy: Path, member) -> None:
    with (copy / "effml_common" / "__init__.py").open("a") as file:
        file.write(f"\nimport {member.module}\n")
    done = lint(copy, copy)
    assert done.returncode == 1
    assert f"effml_common is not allowed to import {member.module}" in done.stdout


@each_method
def test_the_method_importing_the_command_line_is_caught(copy: Path, member) -> None:
    with (copy / member.module / "config.py").open("a") as file:
        file.write(f"\nimport {member.module}.cli\n")
    (copy / member.module / "cli.py").touch()
    done = lint(copy, copy)
    assert done.returncode == 1
    assert f"{member.module}.config is not allowed to import {member.module}.cli" in done.stdout


@pytest.mark.skipif(len(METHODS) < 2, reason="needs two packages in the tree")
def test_a_sibling_import_is_caught(copy: Path) -> None:
    one, other = METHODS[:2]
    with (copy / one.module / "__init__.py").open("a") as file:
        file.write(f"\nimport {other.module}\n")
    assert lint(copy, copy).returncode == 1
