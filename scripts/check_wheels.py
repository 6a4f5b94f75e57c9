"""Does each package work alone, from its wheel, away from the source tree?

    python scripts/check_wheels.py                        every package, with its tests
    python scripts/check_wheels.py --only sliderquant     one package
    python scripts/check_wheels.py --no-tests             import, --help and --version only

Builds all wheels. Then, for each package, a fresh environment gets its wheel and that of
effml-common, at the pinned versions, and nothing else of the workspace.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workspace import COMMON, ROOT, Member, members, pins

# Nothing of the environment or tree that runs this script may leak into the fresh one.
CLEAN = {
    k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT")
}


def run(*command: object, cwd: Path) -> str:
    """Run a command, keep it quiet, and raise with its output if it fails."""
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=cwd, env=CLEAN, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def wheel_of(member: Member, dist: Path) -> Path:
    (wheel,) = dist.glob(f"{member.module}-{member.version}-*.whl")
    return wheel


def check_alone(member: Member, dist: Path, away: Path) -> Path:
    """Install one package alone, look at it from outside; return the environment's Python."""
    python = away / "env" / "bin" / "python"
    common = next(each for each in members() if each.name == COMMON)
    wheels = {wheel_of(member, dist), wheel_of(common, dist)}
    (away / "pins.txt").write_text("\n".join(pins()) + "\n")
    run("uv", "venv", "--quiet", "--python", sys.executable, "env", cwd=away)
    install = ("uv", "pip", "install", "--quiet", "--python", python, "-c", "pins.txt")
    run(*install, *sorted(wheels), cwd=away)
    run("uv", "pip", "check", "--quiet", "--python", python, cwd=away)
    run(python, "-I", "-c", f"import {member.module}", cwd=away)
    for sibling in members():
        if sibling.name not in (member.name, COMMON):
            code = (
                f"import importlib.util as u, sys; sys.exit(bool(u.find_spec('{sibling.module}')))"
            )
            run(python, "-I", "-c", code, cwd=away)
    for script in member.scripts:
        command = python.parent / script
        if "usage:" not in run(command, "--help", cwd=away).lower():
            raise RuntimeError(f"{script} --help printed no usage")
        version = run(command, "--version", cwd=away)
        if member.version not in version:
            raise RuntimeError(f"{script} --version printed {version!r}, not {member.version}")
    return python


def check_tests(member: Member, dist: Path, away: Path, python: Path) -> None:
    """Run the package's fast tests and examples from a copy, against the installed wheel."""
    if not list((member.path / "tests").rglob("test_*.py")):
        raise RuntimeError(f"{member.name} has no tests")
    for name in ("tests", "examples"):
        if (member.path / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(member.path / name, away / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", away / "config.toml")
    install = ("uv", "pip", "install", "--quiet", "--python", python, "-c", "pins.txt")
    wheel = f"{member.name}{member.extras} @ {wheel_of(member, dist).as_uri()}"
    common = next(each for each in members() if each.name == COMMON)
    links = () if member.name == COMMON else (wheel_of(common, dist),)
    group = f"{ROOT / 'pyproject.toml'}:test"
    run(*install, "--group", group, wheel, *links, cwd=away)
    command = [python, "-m", "pytest", "-q", "-c", "config.toml", "--rootdir", away, "tests"]
    subprocess.run([str(part) for part in command], cwd=away, env=CLEAN, check=True)


def check(member: Member, dist: Path, tests: bool) -> str | None:
    """Everything about one package; the reason if it fails."""
    with tempfile.TemporaryDirectory(prefix=f"{member.name}-alone-") as folder:
        away = Path(folder)
        try:
            python = check_alone(member, dist, away)
            if tests:
                check_tests(member, dist, away, python)
        except (RuntimeError, subprocess.CalledProcessError) as problem:
            return str(problem)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [member.name for member in members()]
    parser.add_argument("--only", action="append", choices=names, help="repeat for several")
    parser.add_argument("--no-tests", action="store_true")
    flags = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="effml-dist-") as dist:
        # --no-sources: as a stranger builds it, with no workspace to find siblings in.
        build = ("uv", "build", "--all-packages", "--no-sources", "--quiet", "--out-dir", dist)
        run(*build, cwd=ROOT)
        for member in members():
            if flags.only and member.name not in flags.only:
                continue
            start = time.monotonic()
            print(f"{member.name} {member.version}: alone, from its wheel", flush=True)
            problem = check(member, Path(dist), not flags.no_tests)
            failed += problem is not None
            verdict = f"failed: {problem}" if problem else "ok"
            print(f"{member.name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
