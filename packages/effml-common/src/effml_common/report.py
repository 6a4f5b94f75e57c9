"""Reports of runs: JSON for programs, one HTML page for people, a table for the terminal.

A claim holds only if the mean of its paired gaps over seeds exceeds the two-sided 95 % quantile of
Student's t times its standard error. No absolute path of the user's machine appears in a report.
"""

import base64
import contextlib
import functools
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import jsonable, rank

SCHEMA = 1
FEWEST_COLUMNS = 3  # of a table on the terminal: name, setting and one figure
_PATH = re.compile(r"""(?<![\w/.~)\]}-])/(?=[^\s/])[^\s"'<>,;:|)\]}]*""")
_CSS = """
:root{color-scheme:light dark;--yes:#18794e;--no:#cd2b31;--open:#946800}
@media(prefers-color-scheme:dark){:root{--yes:#4cc38a;--no:#ff6369;--open:#f1a10d}}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .8rem;border-bottom:1px solid #8885;text-align:left}
td{font-variant-numeric:tabular-nums} img{max-width:100%;background:#fff;border-radius:4px}
figcaption,footer{opacity:.7;font-size:.9em} pre{white-space:pre-wrap}
.yes{color:var(--yes)} .no,.error{color:var(--no)} .open{color:var(--open)}
section+section{border-top:1px solid #8885;margin-top:2rem}
"""


def environment(libraries: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware of this run; libraries that are not installed are left out."""
    versions = {}
    for name in ("torch", *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": versions.get("torch"),
        "device": device,
        "cpu_count": os.cpu_count(),
        "libraries": {name: versions[name] for name in libraries if name in versions},
    }


@dataclass(frozen=True)
class Row:
    """One arm of a comparison: for each metric one value per seed."""

    name: str
    setting: str
    metrics: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """A sentence and its paired gaps over seeds; positive gaps speak for it.

    ``outcome`` is what ``resolve`` said of the gaps, for a report read from a file without them.
    """

    id: str
    text: str
    gaps: Sequence[float]
    outcome: tuple[Any, Any, str] | None = None


@dataclass(frozen=True)
class Report:
    """All that a run measured; prints as a table with rich.

    Args:
        seconds: Wall time of the run.
        command: Words of the command line.
        files: Results, relative to the out folder.
        environment: What the function ``environment`` returns.
    """

    package: str
    version: str
    command: Sequence[str]
    seeds: Sequence[int]
    seconds: float
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    files: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=environment)

    def to_json(self) -> dict[str, Any]:
        """The report in plain JSON types, without absolute paths."""
        document: dict[str, Any] = {"schema": SCHEMA, **vars(self), "rows": [], "claims": []}
        for row in self.rows:
            metrics = {name: _summary(values) for name, values in row.metrics.items()}
            document["rows"].append({**vars(row), "metrics": metrics})
        for claim in self.claims:
            value, stderr, holds = claim.outcome or resolve(claim.gaps)
            told = {"id": claim.id, "text": claim.text, "value": value, "stderr": stderr}
            document["claims"].append({**told, "holds": holds})
        if not self.notes:
            del document["notes"]
        return _without_paths(jsonable(document))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        document = self.to_json()
        cells = _cells(document["rows"])
        title, shown = f"{self.package} {self.version}", len(cells[0])
        table = _terminal_table(title, cells)
        # Cells cut to an ellipsis say nothing, so columns at the right that do not fit are left out.
        while shown > FEWEST_COLUMNS and (
            console.measure(table, options=options.update(max_width=10_000)).minimum
            > options.max_width
        ):
            shown -= 1
            table = _terminal_table(title, [row[:shown] for row in cells])
        yield table
        if left_out := cells[0][shown:]:
            yield Text(f"{len(left_out)} more columns in report.html: {', '.join(left_out)}")
        for line in (*map(_sentence, document["claims"]), *self.notes):
            yield Text(line)


@dataclass(frozen=True)
class Section:
    """One part of a page: a report with its PNG figures, or the error that prevented it."""

    name: str
    report: Report | None = None
    figures: Sequence[Path] = ()
    error: str = ""


def t_quantile(df: int) -> float:
    """The t that Student's T with ``df`` >= 1 degrees of freedom stays within, in 95 % of cases."""
    low, high = 1.0, 16.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _mass_within(middle, df) < 0.95 else (low, middle)
    return high


def _mass_within(t: float, df: int) -> float:
    # The finite series for integer df: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    total = term = 0.0 if df == 1 else math.cos(angle) if odd else 1.0
    for k in range(2 + odd, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    mass = math.sin(angle) * total
    return (angle + mass) * 2 / math.pi if odd else mass


def resolve(gaps: Sequence[float]) -> tuple[float, float | None, str]:
    """Judge a claim by its paired gaps over seeds.

    Returns:
        Mean, standard error (None for fewer than 2 gaps) and "yes", "no" or "not resolved". "no"
        means that the opposite is significant; fewer than 3 gaps resolve nothing.
    """
    mean, stderr, n, _ = _summary(gaps).values()
    if n < 3 or not abs(mean) > t_quantile(n - 1) * stderr:
        return mean, stderr, "not resolved"
    return mean, stderr, "yes" if mean > 0 else "no"


def _summary(values: Sequence[float]) -> dict[str, Any]:
    # Added one by one: the built-in sum rounds differently from Python 3.12 on.
    n, add = len(values), functools.partial(functools.reduce, operator.add)
    mean = add(values, 0.0) / n if n else math.nan
    squares = add([(value - mean) * (value - mean) for value in values], 0.0)
    stderr = math.sqrt(squares / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "n": n, "values": list(values)}


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read a ``report.json``.

    Raises:
        InputError: If it cannot be read, or is not what ``write_report`` writes.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        d = {key: value for key, value in document.items() if key != "schema"}
        d["rows"] = [Row(**{**r, "metrics": _values(r["metrics"])}) for r in d["rows"]]
        unknown = {c["holds"] for c in d["claims"]} - {"yes", "no", "not resolved"}
        d["claims"] = [
            Claim(c["id"], c["text"], (), (c["value"], c["stderr"], c["holds"]))
            for c in d["claims"]
        ]
        report = Report(**{**d, "seconds": float(d["seconds"])})
        if unknown or report.to_json() != document:
            raise ValueError(f"it is not of schema {SCHEMA}, or was edited")
        render_html("", [Section("", report)])  # what cannot be shown is no report either
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no readable report: {error}; run its command again") from error


def _values(metrics: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: [float(v) for v in metric["values"]] for name, metric in metrics.items()}


def write_report(
    report: Report, run_dir: str | os.PathLike[str], figures: Sequence[Path] = ()
) -> Path:
    """Write ``report.json`` and the self-contained ``report.html`` (rank 0); returns the latter.

    Raises:
        OSError: If a figure cannot be read or the folder cannot be written.
    """
    page = Path(run_dir) / "report.html"
    if rank() == 0:
        document = json.dumps(report.to_json(), indent=1, allow_nan=False)
        atomic_write(Path(run_dir) / "report.json", document + "\n")
        atomic_write(page, render_html(report.package, [Section("", report, figures)]))
    return page


def render_html(title: str, sections: Sequence[Section]) -> str:
    """One page, without any outside resource, from the reports of one or several packages."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_CSS}</style>'
    body = "\n".join(f"<section>{_section(section)}</section>" for section in sections)
    return f'<!doctype html>\n<html lang="en">{head}<h1>{escape(title)}</h1>\n{body}\n'


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.name)}</h2>"] if section.name else []
    if section.error:
        parts.append(f'<pre class="error">{escape(_without_paths(section.error))}</pre>')
    d = section.report.to_json() if section.report else {"rows": [], "claims": []}
    if d["rows"]:
        header, *rows = _cells(d["rows"])
        lines = [[f"<th>{escape(cell)}" for cell in header]]
        lines += [[f"<td>{escape(cell)}" for cell in row] for row in rows]
        parts.append(f"<table>{''.join('<tr>' + ''.join(line) for line in lines)}</table>")
    for claim in d["claims"]:
        kind = claim["holds"] if claim["holds"] in ("yes", "no") else "open"
        parts.append(f'<p class="{kind}">{escape(_sentence(claim))}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in d.get("notes", ())]
    for figure in map(Path, section.figures):
        data = base64.b64encode(figure.read_bytes()).decode()
        image = f'<img alt="{escape(figure.stem)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(figure.stem)}</figcaption></figure>")
    return "\n".join([*parts, f"<footer>{escape(_origin(d))}</footer>" if section.report else ""])


def _origin(d: Mapping[str, Any]) -> str:
    facts = {k: v for k, v in d["environment"].items() if k != "libraries"}
    facts |= d["environment"].get("libraries", {})
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    run = f"{d['package']} {d['version']}: {' '.join(d['command'])}"
    return f"{run} (seeds {d['seeds']}, {d['seconds']:.0f} s). {where}"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    cells = [["name", "setting", *names]]
    for row in rows:
        numbers = [_number(**row["metrics"][n]) if n in row["metrics"] else "" for n in names]
        cells.append([row["name"], row["setting"], *numbers])
    return cells


def _terminal_table(title: str, cells: Sequence[Sequence[str]]) -> Any:
    """A table whose numbers keep their width; names and settings may wrap."""
    from rich.table import Table
    from rich.text import Text

    header, *rows = cells
    table = Table(title=title)
    for i, name in enumerate(header):
        longest = max(len(row[i]) for row in rows) if rows else 0
        table.add_column(name, min_width=min(longest, 12) if i < 2 else longest)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _number(mean: Any, stderr: Any, **_: Any) -> str:
    return f"{float(mean):.4g}" + ("" if stderr is None else f" ± {float(stderr):.2g}")


def _sentence(claim: Mapping[str, Any]) -> str:
    return f"{claim['holds']}: {claim['text']} (gap {_number(claim['value'], claim['stderr'])})"


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_paths(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value) and "\n" not in value:  # a word of its own may hold spaces
        return _relative(value)
    return _PATH.sub(lambda found: _relative(found[0]), value)


def _relative(path: str) -> str:
    inside = Path(os.path.normpath(path)).is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else os.path.basename(os.path.normpath(path))
