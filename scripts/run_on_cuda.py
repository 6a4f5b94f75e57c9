"""Everything that wants a card, on a bare machine: install, measure its ceilings, test, time.

    benchmarks/cuda.sh OUT [--device cpu] [--tiny] [--minutes 8] [--wheels FOLDER]

Each part is a process of its own with its own time limit, the most valuable first; summary.json is
written after every part, so nothing that was measured is lost when a later part fails or overruns.
OUT gets summary.json, log.txt and one <module>-cuda.json a package. Exits 1 if any part failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType

from packaging.requirements import Requirement

from carry_wheels import LEFT_OUT, WHEELS
from workspace import ROOT, members

# The order is by value: if the time runs out, the last ones are lost.
MODULES = ("sliderquant", "morse_diffusion", "fis_dit", "scalekd", "com_pt", "af_dcd")
# Seconds that a part may take at most, of a run of 8 minutes; a longer run gives each part more.
INSTALL, CEILINGS, TESTS, MODULE = 90, 60, 120, 75
MINUTES = 8
LEAST, GRACE = 5, 5  # seconds: too few to start a part with; to finish in after SIGINT
IMPORTS = 25  # seconds of a package's limit that its timings leave for imports and the last step


@dataclass(frozen=True)
class Part:
    """One process of the run."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    plans: bool = False  # takes --seconds and shares them among what it times


@dataclass
class Outcome:
    """How a part ended."""

    part: str
    state: str  # ok, failed, timed out, no time left
    exit: int | None
    seconds: float


def plan(out: Path, scratch: Path, wheels: Path, device: str, tiny: bool) -> Iterator[Part]:
    """All parts, the most valuable first."""
    python = sys.executable
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    target = ("--target", str(scratch / "site"))
    yield Part("install", [python, "-m", "pip", *install, "--upgrade", *target, *files], INSTALL)

    where = ("--device", device, *(("--tiny",) if tiny else ()))
    ceilings = (python, "-m", "benchmarks.cuda_ceilings", *where)
    yield Part("ceilings", [*ceilings, "--out", str(scratch / "ceilings.json")], CEILINGS)

    # Without a card the tests cannot run, but that they import and are found can be seen.
    tests = [python, "-m", "pytest", "-m", "cuda", "-v", "-rs", "-p", "no:cacheprovider"]
    tests += ["--durations=10", "--timeout=60", "-n", "0"]  # one process: they share one card
    tests += ["--collect-only"] * (device == "cpu")
    yield Part("tests", [*tests, *marked_files()], TESTS)

    for module in MODULES:
        command = (python, "-m", f"benchmarks.{module}.cuda", *where, "--out", str(out))
        yield Part(module, command, MODULE, plans=True)


def marked_files() -> list[str]:
    """Test files that speak of the mark: importing all the others would take longer than the tests."""
    files = (*ROOT.glob("packages/*/tests/**/test_*.py"), *ROOT.glob("tests/**/test_*.py"))
    return [str(file) for file in sorted(files) if "mark.cuda" in file.read_text()]


def environment(site: Path) -> dict[str, str]:
    """What the parts see: our sources, then the carried wheels, then the machine; no network."""
    sources = [str(member.path / "src") for member in members()]
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return {
        **os.environ,
        **dict.fromkeys(offline, "1"),
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join([*sources, str(site)]),
        "PYTHONUNBUFFERED": "1",
    }


def describe_members(site: Path) -> None:
    """Write the metadata that an installation of our packages would have: name, version, needs."""
    for member in members():
        project = tomllib.loads((member.path / "pyproject.toml").read_text())["project"]
        folder = site / f"{member.module}-{member.version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["Metadata-Version: 2.1", f"Name: {member.name}", f"Version: {member.version}"]
        lines += (f"Requires-Dist: {each}" for each in project["dependencies"])
        (folder / "METADATA").write_text("\n".join(lines) + "\n")


def unmet(site: Path) -> list[str]:
    """Requirements of our packages and the carried ones that this machine does not meet."""
    found = []
    versions = {d.name: d.version for d in metadata.distributions(path=[*sys.path, str(site)])}
    versions = {name.lower().replace("_", "-"): number for name, number in versions.items()}
    for distribution in metadata.distributions(path=[str(site)]):
        for each in map(Requirement, distribution.requires or ()):
            name = each.name.lower().replace("_", "-")
            if name in LEFT_OUT or (each.marker and not each.marker.evaluate({"extra": ""})):
                continue
            version = versions.get(name, "nothing")
            if version == "nothing" or not each.specifier.contains(version, True):
                found.append(f"{distribution.name} requires {each}; {version} is here")
    return sorted(found)


def run_part(part: Part, limit: float, log: Path, environ: Mapping[str, str]) -> Outcome:
    """Run one part, its output into the log, and end it and its children at the limit."""
    start = time.monotonic()
    seconds = ("--seconds", f"{max(limit - IMPORTS, LEAST):.0f}") if part.plans else ()
    with log.open("ab") as file:
        file.write(f"\n=== {part.name}, {limit:.0f} s at most\n".encode())
        file.flush()
        process = subprocess.Popen(
            [*part.command, *seconds],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        state = ""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            # An interrupt, as from a keyboard: pytest still says what passed and failed.
            state = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    state = state or ("failed" if process.returncode else "ok")
    return Outcome(part.name, state, process.returncode, round(time.monotonic() - start, 1))


def write_summary(path: Path, head: Mapping[str, object], outcomes: Sequence[Outcome]) -> None:
    """Replace summary.json in one step."""
    parts = [vars(outcome) for outcome in outcomes]
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**head, "parts": parts}, indent=1) + "\n")
    new.replace(path)


def read_json(path: Path) -> dict[str, object]:
    """A part's result, or nothing if it wrote none."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def run_all(flags: argparse.Namespace, scratch: Path) -> list[Outcome]:
    """Run all parts, each within its own limit and what is left of the whole."""
    deadline = time.monotonic() + 60 * flags.minutes
    site, log = scratch / "site", flags.out / "log.txt"
    site.mkdir()
    head: dict[str, object] = {"schema": 1, "device": flags.device, "tiny": flags.tiny}
    outcomes: list[Outcome] = []
    for part in plan(flags.out, scratch, flags.wheels, flags.device, flags.tiny):
        limit = min(part.limit * flags.minutes / MINUTES, deadline - time.monotonic() - GRACE)
        if limit < LEAST:
            outcomes.append(Outcome(part.name, "no time left", None, 0.0))
        else:
            before = log.stat().st_size if log.exists() else 0
            outcomes.append(run_part(part, limit, log, environment(site)))
            if outcomes[-1].state != "ok":
                tail = log.read_bytes()[before:].decode(errors="replace").splitlines()[-15:]
                print("\n".join(tail), flush=True)
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds} s", flush=True)

        # What the next parts stand on, and what the first ones found.
        if part.name == "install":
            describe_members(site)
            head["unmet"] = unmet(site)
            for line in unmet(site):
                print(f"unmet: {line}", flush=True)
        if part.name == "ceilings":
            head |= read_json(scratch / "ceilings.json")
        write_summary(flags.out / "summary.json", head, outcomes)
    return outcomes


def stop(number: int, _frame: FrameType | None) -> None:
    """End like an interrupt, so that the running part is ended too."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/cuda.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a try, not a result")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default 8)")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="default .carry/wheels")
    flags = parser.parse_args()
    flags.out, flags.wheels = flags.out.resolve(), flags.wheels.resolve()
    if not list(flags.wheels.glob("*.whl")):
        parser.error(f"no wheels in {flags.wheels}; run python scripts/carry_wheels.py")
    flags.out.mkdir(parents=True, exist_ok=True)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(
        signal.SIGINT, stop
    )  # parts would inherit that it is ignored, as in a background job
    with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
        outcomes = run_all(flags, Path(scratch))
    print(f"\n{'part':<18}{'state':<14}{'exit':>5}{'seconds':>9}")
    for each in outcomes:
        code = "" if each.exit is None else each.exit
        print(f"{each.part:<18}{each.state:<14}{code:>5}{each.seconds:>9.1f}")
    return int(any(each.state != "ok" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
