"""The README's two commands are the ones that everything else runs."""

import re

from workspace import ROOT

COMMANDS = [
    "pip install uv && uv run python benchmarks/run.py",
    "pip install uv && uv run pytest",
]
README = (ROOT / "README.md").read_text()


def test_readme_has_exactly_the_two_commands_in_its_blocks() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines()] == COMMANDS


def test_both_commands_are_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert all(command in first_screen for command in COMMANDS)


def test_ci_runs_the_second_command_as_written() -> None:
    assert f"bash -c '{COMMANDS[1]}'" in (ROOT / ".ci/run").read_text()


def test_github_runs_both_commands_as_written() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert f"run: {COMMANDS[0]}" in workflow
    assert "run: .ci/run tests" in workflow


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
