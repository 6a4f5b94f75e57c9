"""The members of the workspace, read from their pyproject files, for scripts and tests."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = "effml-common"


@dataclass(frozen=True)
class Member:
    """One package of the workspace."""

    name: str
    path: Path
    version: str
    scripts: dict[str, str]  # console script -> "module:function"
    extras: str  # those the workspace installs it with: "" or "[plot]"

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.path / "src" / self.module


def root_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def members() -> list[Member]:
    """All members, effml-common first and the rest by name."""
    extras = {}
    for requirement in root_table()["project"]["dependencies"]:
        name = re.split(r"[\[<>=~!; ]", requirement)[0]
        extras[name] = requirement.removeprefix(name)
    found = []
    for file in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        name = project["name"]
        scripts = project.get("scripts", {})
        found.append(Member(name, file.parent, project["version"], scripts, extras.get(name, "")))
    return sorted(found, key=lambda member: (member.name != COMMON, member.name))


def pins() -> list[str]:
    """The exact versions that the root constrains the workspace to."""
    return root_table()["tool"]["uv"]["constraint-dependencies"]
