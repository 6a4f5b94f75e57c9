"""Everything that wants a card, on a bare machine: install, measure its ceilings, test, time.

    benchmarks/cuda.sh OUT [--device cpu] [--tiny] [--minutes 8] [--wheels FOLDER]

Each part is a process of its own with its own time limit, the most valuable first; summary.json is
written after every part, so nothing that was measured is lost when a later part fails or overruns.
OUT gets summary.json, log.txt and one <module>-cuda.json a package; those of an earlier run are
removed first. Exits 1 if any part failed, 128 + N if signal N ended the run.
"""

import argparse
import json
import math
import os
import re
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
POLL = 0.05  # seconds between two looks at the running part
PASSED = r"[1-9]\d* passed"  # in the closing line of pytest, which may be coloured


@dataclass(frozen=True)
class Part:
    """One process of the run."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    plans: bool = False  # takes --seconds and shares them among what it times
    must_pass: bool = False  # runs pytest, which exits 0 even if it skipped every test


@dataclass
class Outcome:
    """How a part ended."""

    part: str
    state: str  # ok, failed, timed out, interrupted, no time left, not run
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
    yield Part("tests", [*tests, *marked_files()], TESTS, must_pass=device != "cpu")

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


def distributions(*path: str) -> Iterator[metadata.Distribution]:
    """What is installed there, without the folders that a removal left behind: they have no name."""
    for each in metadata.distributions(path=list(path)):
        if "Name" in each.metadata and "Version" in each.metadata:
            yield each


def unmet(site: Path) -> list[str]:
    """Requirements of our packages and the carried ones that this machine does not meet."""
    found = []
    versions = {d.name: d.version for d in distributions(*sys.path, str(site))}
    versions = {name.lower().replace("_", "-"): number for name, number in versions.items()}
    for distribution in distributions(str(site)):
        for each in map(Requirement, distribution.requires or ()):
            name = each.name.lower().replace("_", "-")
            if name in LEFT_OUT or (each.marker and not each.marker.evaluate({"extra": ""})):
                continue
            version = versions.get(name, "nothing")
            if version == "nothing" or not each.specifier.contains(version, True):
                found.append(f"{distribution.name} requires {each}; {version} is here")
    return sorted(found)


def run_part(
    part: Part, limit: float, log: Path, environ: Mapping[str, str], signals: Sequence[int] = ()
) -> Outcome:
    """Run one part, its output into the log; end it and its children at the limit or a signal."""
    start = time.monotonic()
    seconds = ("--seconds", f"{max(limit - IMPORTS, LEAST):.0f}") if part.plans else ()
    with log.open("ab") as file:
        before = file.tell()
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
            while process.poll() is None and not state:
                if signals:
                    state = "interrupted"
                elif time.monotonic() > start + limit:
                    state = "timed out"
                else:
                    time.sleep(POLL)
            if state:
                # An interrupt, as from a keyboard: pytest still says what passed and failed.
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        state = state or ("failed" if process.returncode else "ok")
        if state == "ok" and part.must_pass and not re.search(PASSED, read_from(log, before)):
            state = "failed"
            file.write(b"no test passed\n")
    return Outcome(part.name, state, process.returncode, round(time.monotonic() - start, 1))


def read_from(log: Path, start: int) -> str:
    """The log from a byte on."""
    return log.read_bytes()[start:].decode(errors="replace")


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


def say(text: str) -> None:
    """Print a line for whoever still listens; after a hang-up nobody does, and the run goes on."""
    try:
        print(text, flush=True)
    except OSError:
        # Elsewhere from here on, or the exit would fail on what could not be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_all(flags: argparse.Namespace, scratch: Path, signals: Sequence[int] = ()) -> list[Outcome]:
    """Run all parts, each within its own limit and what is left of the whole.

    Once there is a number in ``signals``, the running part is ended and no other one is started.
    """
    deadline = time.monotonic() + 60 * flags.minutes
    site, log = scratch / "site", flags.out / "log.txt"
    site.mkdir()
    head: dict[str, object] = {"schema": 1, "device": flags.device, "tiny": flags.tiny}
    outcomes: list[Outcome] = []
    for part in plan(flags.out, scratch, flags.wheels, flags.device, flags.tiny):
        limit = min(part.limit * flags.minutes / MINUTES, deadline - time.monotonic() - GRACE)
        before = log.stat().st_size
        if signals:
            outcome = Outcome(part.name, "not run", None, 0.0)
        elif limit < LEAST:
            outcome = Outcome(part.name, "no time left", None, 0.0)
        else:
            outcome = run_part(part, limit, log, environment(site), signals)
        outcomes.append(outcome)

        # What the next parts stand on, and what the first ones found.
        missing: list[str] = []
        if part.name == "install" and not signals:
            describe_members(site)
            missing = unmet(site)
            head["unmet"] = missing
        if part.name == "ceilings":
            head |= read_json(scratch / "ceilings.json")
        write_summary(flags.out / "summary.json", head, outcomes)

        tail = [] if outcome.state == "ok" else read_from(log, before).splitlines()[-15:]
        about = f"{part.name}: {outcome.state}, {outcome.seconds} s"
        for line in (*tail, about, *(f"unmet: {each}" for each in missing)):
            say(line)
    return outcomes


def prepare(out: Path) -> None:
    """Make the folder for the results and remove those of an earlier run.

    Otherwise a result from before would pass for one of a part that now fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = (f"{module}-cuda.json" for module in MODULES)
    for name in ("log.txt", "summary.json", *results):
        (out / name).unlink(missing_ok=True)
    (out / "log.txt").touch()


def catch_signals() -> list[int]:
    """A list that gets the number of each signal that asks the run to end."""
    signals: list[int] = []
    # Also where an interrupt is ignored, as in a background job: parts would inherit that.
    caught = [signal.SIGTERM, signal.SIGINT]
    # But under nohup a hang-up is to be ignored.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    for number in caught:
        signal.signal(number, lambda number, _frame: signals.append(number))
    return signals


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
    called_from = Path(os.environ.get("CALLED_FROM", "."))
    flags.out, flags.wheels = ((called_from / path).resolve() for path in (flags.out, flags.wheels))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", flags.device):
        parser.error(f"--device {flags.device}: use cuda, cuda:N or cpu")
    if not 0 < flags.minutes < math.inf:
        parser.error(f"--minutes {flags.minutes:g}: must be a finite number above 0")
    if not list(flags.wheels.glob("*.whl")):
        parser.error(f"no wheels in {flags.wheels}; run python scripts/carry_wheels.py")
    try:
        prepare(flags.out)
    except OSError as error:
        parser.error(f"cannot write to {flags.out} ({error.strerror}); name another folder")

    signals = catch_signals()
    with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
        outcomes = run_all(flags, Path(scratch), signals)
    say(f"\n{'part':<18}{'state':<14}{'exit':>5}{'seconds':>9}")
    for each in outcomes:
        code = "" if each.exit is None else each.exit
        say(f"{each.part:<18}{each.state:<14}{code:>5}{each.seconds:>9.1f}")
    if signals:
        return 128 + signals[0]
    return int(any(each.state != "ok" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
