"""Run the demo of every package present and write one self-contained HTML report.

Each demo is a process of its own, so one that fails is reported and the others still run. Packages
are found, not listed: a member of the workspace with a console script and a demo module takes part.
"""

import json
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import SCHEMA, html_section, render_html, without_paths

ROOT = Path(__file__).resolve().parent.parent
PROG = "python benchmarks/run.py"
EXAMPLES = (PROG, f"{PROG} --only sliderquant --seeds 3 --out report")
# Warm seconds per seed on two CPU cores, for the estimate only; a demo may take 180.
USUAL = {
    "af-dcd": 150,
    "com-pt": 120,
    "fis-dit": 75,
    "morse-diffusion": 150,
    "scalekd": 150,
    "sliderquant": 150,
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Run the demo of every package present and write one HTML report."""

    only: str | None = field(default=None, metadata={"help": "the one package to run"})
    seeds: int = field(default=1, metadata={"help": "seeds of each demo; claims need 3"})
    out: str | None = field(
        default=None, metadata={"help": "new or empty folder (default runs/benchmarks-<time>)"}
    )

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; give 1 or more, and 3 or more for claims")


@dataclass
class Outcome:
    """How one demo ended."""

    name: str
    seconds: float = 0.0
    failure: str = ""  # empty if it worked
    last_lines: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None


def find_demos(root: Path = ROOT) -> dict[str, list[str]]:
    """The demo command of every workspace member that has one."""
    found = {}
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        if project.get("scripts") and list(file.parent.glob("src/*/demo/report.py")):
            script = next(iter(project["scripts"]))
            found[project["name"]] = [str(Path(sys.executable).with_name(script)), "demo"]
    return found


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_demo(name: str, command: Sequence[str], seeds: int, folder: Path, echo: bool) -> Outcome:
    """Run one demo, passing on what it prints, and read its report."""
    outcome, start = Outcome(name), time.monotonic()
    last: deque[str] = deque(maxlen=20)
    try:
        with subprocess.Popen(
            [*command, "--seeds", str(seeds), "--out", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in process.stdout or ():
                    last.append(line.rstrip())
                    if echo:
                        tell(f"  {line.rstrip()}")
            except BaseException:  # Ctrl-C or SIGTERM: no demo outlives us
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        if process.returncode:
            outcome.failure = f"exit code {process.returncode}"
        else:
            outcome.report = read_report(folder / "run" / "report.json")
    except (OSError, InputError) as error:
        outcome.failure = str(error)
    if outcome.failure:  # what is kept names no folder of this machine; the page sees to its own
        outcome.failure = outcome.failure.replace(f"{folder.parent}/", "")
        outcome.last_lines = list(last)
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def read_report(path: Path) -> dict[str, Any]:
    """The JSON of a demo's report, which the page can show.

    Raises:
        InputError: If the demo left none, or left something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"it is of schema {document['schema']}, not {SCHEMA}")
        html_section(document)  # what cannot be shown is no report either
        return document
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no readable report: {error}; run its command again") from error


def section(outcome: Outcome, folder: Path) -> str:
    """One demo's part of the page: its report and pictures, or how it failed."""
    heading = f"<h2>{escape(outcome.name)}</h2>\n"
    if outcome.report is not None:
        return heading + html_section(outcome.report, sorted((folder / "run").glob("*.png")))
    error = without_paths("\n".join([outcome.failure, "", *outcome.last_lines]))
    return f'{heading}<pre class="error">{escape(error)}</pre>'


def write_report(outcomes: Sequence[Outcome], out: Path, seeds: int) -> dict[str, Any]:
    """Write the page and its summary; return the summary."""
    summary = {
        "schema": 1,
        "seeds": seeds,
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "demos": [
            {
                "name": outcome.name,
                "status": "failed" if outcome.failure else "done",
                "seconds": outcome.seconds,
                "failure": outcome.failure,
                "report": outcome.report,
            }
            for outcome in outcomes
        ],
    }
    sections = [section(outcome, out / outcome.name) for outcome in outcomes]
    atomic_write(out / "index.html", render_html("effml demos", sections))
    atomic_write(out / "report.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def run_all(
    config: BenchmarkConfig, demos: Mapping[str, Sequence[str]], echo: bool
) -> dict[str, Any]:
    """Run the demos one after the other and write the report after each."""
    if config.only is not None and config.only not in demos:
        raise ConfigError(f"there is no demo {config.only}; use one of {', '.join(demos)}")
    out = Path(config.out or time.strftime("runs/benchmarks-%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is already there; name a new folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); name another --out") from None
    names = [name for name in demos if config.only in (None, name)]
    outcomes: list[Outcome] = []
    summary, start = write_report(outcomes, out, config.seeds), time.monotonic()
    for number, name in enumerate(names, 1):
        left = sum(USUAL.get(each, 180) for each in names[number - 1 :]) * config.seeds
        spent = time.monotonic() - start
        progress = f"[{number}/{len(names)}] {name}: {spent:.0f} s so far"
        # Models are trained once and kept, so the first run takes longer.
        tell(f"{progress}, about {left / 60:.0f} min to go (first run: up to three times that)")
        outcomes.append(run_demo(name, demos[name], config.seeds, out / name, echo))
        verdict = f"failed: {outcomes[-1].failure}" if outcomes[-1].failure else "done"
        tell(f"{name}: {verdict} ({outcomes[-1].seconds:.0f} s)")
        summary = write_report(outcomes, out, config.seeds)
    tell(f"report: {out / 'index.html'}")
    return summary


def stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signum)


def main(argv: Sequence[str], demos: Mapping[str, Sequence[str]] | None = None) -> int:
    flags = {word for word in argv if word in COMMON_FLAGS}
    words = [word for word in argv if word not in COMMON_FLAGS]
    try:
        config = parse(BenchmarkConfig, words, prog=PROG, examples=EXAMPLES)
        found = find_demos() if demos is None else demos
        summary = run_all(config, found, echo="--quiet" not in flags)
    except InputError as error:
        if "--debug" in flags:
            raise
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    if "--json" in flags:
        print(json.dumps(summary, allow_nan=False))
    return 1 if any(demo["status"] == "failed" for demo in summary["demos"]) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(sys.argv[1:]))
