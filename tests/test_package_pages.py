"""README and docs/ of a package: short, commands that are accepted, links that lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from effml_common.parsing import COMMON_FLAGS, parse
from workspace import COMMON, Member, members

METHODS = [member for member in members() if member.name != COMMON]
each_package = pytest.mark.parametrize("member", METHODS, ids=lambda member: member.name)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
FOLDERS = "method|kernels|adapters|training|commands|demo|configs"


def pages(member: Member) -> list[Path]:
    return [member.path / "README.md", *sorted((member.path / "docs").glob("*.md"))]


def command_lines(member: Member, page: Path) -> list[str]:
    """Every command in a block, launched or not, and every one in backticks that has a setting."""
    (script,) = member.scripts
    text = page.read_text()
    blocks = "\n".join(block[3] for block in BLOCK.finditer(text) if not block[2])
    lines = [line.strip() for line in blocks.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:[a-z][^`\n]* -m )?[\w-]+ [\w-]+ [^`]+)`", text)
    launcher = rf"^(accelerate launch|torchrun|python)\b.*? -m {member.module} "
    lines = [re.sub(launcher, f"{script} ", line) for line in lines]
    return [line for line in lines if re.match(rf"{script} [a-z][\w-]* .", line)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_package
def test_a_readme_is_short_and_lists_every_command(member: Member) -> None:
    text = (member.path / "README.md").read_text()
    assert 500 <= len(BLOCK.sub("", text).split()) <= 700
    assert len(text.split()) <= 800
    (script,) = member.scripts
    rows = re.findall(rf"^\| `{script} ([\w-]+)` \|", text, re.MULTILINE)
    commands = importlib.import_module(f"{member.module}.cli").COMMANDS
    assert sorted(rows) == sorted(command.name for command in commands)


@each_package
def test_every_command_line_is_accepted_by_its_parser(member: Member) -> None:
    commands = {c.name: c for c in importlib.import_module(f"{member.module}.cli").COMMANDS}
    lines = [line for page in pages(member) for line in command_lines(member, page)]
    assert len(lines) >= len(commands)
    for line in lines:
        _, verb, *words = shlex.split(line)
        module, _, name = commands[verb].config.partition(":")
        settings = getattr(importlib.import_module(module), name)
        words = [word for word in words if word not in (*COMMON_FLAGS, "--help")]
        if words:
            assert isinstance(parse(settings, words, prog=verb), settings), line


@each_package
def test_links_and_anchors_lead_somewhere(member: Member) -> None:
    links = [
        (page, link)
        for page in pages(member)
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", BLOCK.sub("", page.read_text()))
    ]
    assert len(links) > 5
    for page, link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


@each_package
def test_modules_that_the_pages_name_are_there(member: Member) -> None:
    """Modules are named relative to src/<module>."""
    text = "\n".join(BLOCK.sub("", page.read_text()) for page in pages(member))
    names = re.findall(rf"`((?:{FOLDERS})/[\w/*]+(?:\.py)?)`", text)
    assert len(names) > 5
    assert [name for name in names if not [*member.source.glob(name)]] == []
