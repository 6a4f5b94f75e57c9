"""Exact versions live in the root's constraint-dependencies, and nowhere else."""

import re
import subprocess
import sys
import tomllib

import pytest

from workspace import ROOT, Member, members, pins

EXACT = re.compile(r"[a-z0-9-]+==\d[\w.+!]*( ; [\w.<>=!'() ]+)?")


def test_pins_are_exact_versions_without_any_address() -> None:
    assert len(pins()) > 20
    assert [line for line in pins() if not EXACT.fullmatch(line)] == []


def test_pins_bind_on_linux_only_so_that_other_platforms_can_resolve() -> None:
    assert [line for line in pins() if "sys_platform == 'linux'" not in line] == []


def test_the_lock_is_ignored_and_untracked() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()
    done = subprocess.run(["git", "ls-files", "uv.lock"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_packages_declare_ranges_not_pins(member: Member) -> None:
    project = tomllib.loads((member.path / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    declared = project["dependencies"] + [line for extra in extras for line in extra]
    assert [line for line in declared if "==" in line or "://" in line] == []


@pytest.mark.slow  # needs the package index
def test_pins_resolved_anew_give_exactly_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/pins.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
