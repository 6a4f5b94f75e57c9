"""The exact versions of the workspace: `[tool.uv] constraint-dependencies` of the root pyproject.

    python scripts/pins.py --check      do the pins, resolved anew, give exactly themselves?
    python scripts/pins.py --write      pin what is new, drop what is gone, keep the rest
    python scripts/pins.py --upgrade    forget the pins, resolve to the newest, pin that
    python scripts/pins.py --clear      remove them (CI does, to test newest and lowest versions)

uv.lock is not committed because it records download addresses; these lines carry none. Everything
is resolved in a temporary copy, so neither uv.lock nor .venv of the tree is touched.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from workspace import ROOT, members, pins

EXPORT = [
    *("uv", "export", "--quiet", "--all-packages", "--all-extras", "--all-groups"),
    *("--no-emit-workspace", "--no-hashes", "--no-annotate", "--no-header"),
]
# Exact pins need one platform: a pinned accelerator wheel has no file for the others. So the copy
# is narrowed, which puts the platform into each line's marker, and the tree itself is not.
NARROW = """environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]"""
TABLE = re.compile(r"^constraint-dependencies = \[.*?\]$", re.MULTILINE | re.DOTALL)
# One exact version, then perhaps a marker: no addresses, no ranges.
LINE = re.compile(r"[a-z0-9.-]+==[\w.!+]+( ; [\w.<>=!'() ]+)?")


def with_pins(pyproject: str, lines: list[str]) -> str:
    body = "".join(f'    "{line}",\n' for line in lines)
    table = f"constraint-dependencies = [\n{body}]" if lines else "constraint-dependencies = []"
    text, count = TABLE.subn(lambda _: table, pyproject)
    if count != 1:
        raise SystemExit(
            "error: no constraint-dependencies in the root pyproject; add an empty list"
        )
    return text


def resolve(constraints: list[str]) -> list[str]:
    """What uv picks for the whole workspace under these constraints, as pin lines."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        pyproject = (ROOT / "pyproject.toml").read_text()
        pyproject = with_pins(pyproject, constraints)
        pyproject = pyproject.replace("[tool.uv]\n", f"[tool.uv]\n{NARROW}\n")
        (copy / "pyproject.toml").write_text(pyproject)
        for member in members():
            place = copy / "packages" / member.path.name
            place.mkdir(parents=True)
            shutil.copy(member.path / "pyproject.toml", place)
        done = subprocess.run(EXPORT, cwd=copy, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: uv could not resolve the workspace; see below\n{done.stderr}")
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if not LINE.fullmatch(line):
            raise SystemExit(f"error: {line!r} is not one exact version; pins carry nothing else")
    return lines


def write(constraints: list[str]) -> list[str]:
    lines = resolve(constraints)
    if resolve(lines) != lines:
        raise SystemExit("error: the pins do not reproduce themselves; nothing was written")
    save(lines)
    return lines


def save(lines: list[str]) -> None:
    path = ROOT / "pyproject.toml"
    path.write_text(with_pins(path.read_text(), lines))


def check() -> int:
    have, found = pins(), resolve(pins())
    if have == found:
        print(f"{len(have)} pins, resolved anew, give exactly themselves")
        return 0
    for sign, lines in (("-", set(have) - set(found)), ("+", set(found) - set(have))):
        print(*(f"{sign} {line}" for line in sorted(lines)), sep="\n")
    print("error: this is not what resolves; run python scripts/pins.py --write", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    for flag in ("check", "write", "upgrade", "clear"):
        action.add_argument(f"--{flag}", action="store_true")
    chosen = parser.parse_args()
    if chosen.check:
        return check()
    if chosen.clear:
        save([])
    else:
        lines = write([] if chosen.upgrade else pins())
        print(f"{len(lines)} pins written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
