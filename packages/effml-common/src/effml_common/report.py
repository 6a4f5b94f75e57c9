"""Reports of runs: JSON for programs, one HTML page for people, a table for the terminal.

A claim holds only if the mean of its paired gaps over seeds exceeds the two-sided 95 % quantile of
Student's t times its standard error. No absolute path of the user's machine appears in a report.
"""

import base64
import contextlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effml_common.device import device_name
from effml_common.files import atomic_write
from effml_common.logging import jsonable, rank, say, words

if TYPE_CHECKING:
    import torch

SCHEMA = 1
FEWEST_COLUMNS = 3  # of a table on the terminal: name, setting and one figure
FEWEST_SEEDS = 3  # that can resolve a claim
_LONGEST_CELL = 300  # characters of a summary's value, so that it does not fill the terminal
_PATH = re.compile(r"""(?<![\w/.~)\]}-])/(?=[^\s/])[^\s"'<>,;:|)\]}]*""")


@dataclass(frozen=True)
class Row:
    """One arm of a comparison: for each metric one value per seed."""

    name: str
    setting: str
    metrics: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """A sentence and its paired gaps over seeds; positive gaps speak for it."""

    id: str
    text: str
    gaps: Sequence[float]


def environment(libraries: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware of this run; libraries that are not installed are left out."""
    versions = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "device": device,
        "cpu_count": os.cpu_count(),
        "libraries": versions,
    }


@dataclass(frozen=True)
class Report:
    """All that a run measured; prints as a table with rich."""

    package: str
    version: str
    command: Sequence[str]
    seeds: Sequence[int]
    seconds: float  # of wall time
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    files: Sequence[str] = ()  # results, relative to the out folder
    environment: Mapping[str, Any] = field(default_factory=environment)

    def to_json(self) -> dict[str, Any]:
        """The report in plain JSON types, without absolute paths."""
        document: dict[str, Any] = {"schema": SCHEMA, **vars(self), "rows": [], "claims": []}
        for row in self.rows:
            metrics = {name: _statistics(values) for name, values in row.metrics.items()}
            document["rows"].append({**vars(row), "metrics": metrics})
        for claim in self.claims:
            verdict = zip(("value", "stderr", "holds"), resolve(claim.gaps), strict=True)
            document["claims"].append({"id": claim.id, "text": claim.text, **dict(verdict)})
        if not self.notes:
            del document["notes"]
        return without_paths(jsonable(document))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        document = self.to_json()
        cells, title = _table_cells(document["rows"]), f"{self.package} {self.version}"

        # Cells cut to an ellipsis say nothing, so columns at the right that do not fit are left out.
        measure = partial(console.measure, options=options.update(max_width=10_000))
        columns, table = len(cells[0]), _terminal_table(title, cells)
        while columns > FEWEST_COLUMNS and measure(table).minimum > options.max_width:
            columns -= 1
            table = _terminal_table(title, [row[:columns] for row in cells])
        yield table

        # What the table does not show, and what it means.
        if omitted := cells[0][columns:]:
            yield Text(f"{len(omitted)} more columns in report.html: {', '.join(omitted)}")
        for line in (*map(_sentence, document["claims"]), *self.notes):
            yield Text(line)


class ReportBuilder:
    """What every report says of its run: version, command, wall time, libraries and device.

    The clock starts here. ``libraries`` are distributions that the result may depend on.

    >>> builder = ReportBuilder("effml-common")
    >>> builder.build([Row("adam", "lr 0.1", {"loss": [0.5, 0.4]})]).to_json()["rows"][0]["name"]
    'adam'
    """

    def __init__(self, package: str, libraries: Sequence[str] = ()) -> None:
        self._package, self._libraries = package, libraries
        self._started = time.monotonic()

    def build(
        self, rows: Sequence[Row], *, device: "torch.device | str" = "cpu", **fields: Any
    ) -> Report:
        """Report of the run as it stands now; ``fields`` are ``seeds``, ``claims`` and the like."""
        name = device if isinstance(device, str) else device_name(device)
        return Report(
            package=self._package,
            version=importlib.metadata.version(self._package),
            command=sys.argv,
            seconds=time.monotonic() - self._started,
            rows=rows,
            environment=environment(self._libraries, name),
            **{"seeds": (), **fields},
        )

    def write(
        self, run_dir: Path, rows: Sequence[Row], *, figures: Sequence[Path] = (), **fields: Any
    ) -> Report:
        """Build the report, write it into ``run_dir``, created if missing, and say where it is.

        ``figures`` are PNG files for the page; the report names them unless ``files`` is given.
        The other ``fields`` are those of ``build``, and errors those of ``write_report``.
        """
        report = self.build(rows, **{"files": [path.name for path in figures], **fields})
        if rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
        say(f"report: {write_report(report, run_dir, figures)}")
        return report


def write_report(report: Report, run_dir: Path, figures: Sequence[Path] = ()) -> Path:
    """Write ``report.json`` and the self-contained ``report.html`` (rank 0); returns the latter.

    Raises:
        OSError: If a figure cannot be read or the folder cannot be written.
    """
    page = run_dir / "report.html"
    if rank() == 0:
        document = report.to_json()
        text = json.dumps(document, indent=1, allow_nan=False)
        atomic_write(run_dir / "report.json", text + "\n")
        atomic_write(page, render_html(report.package, [html_section(document, figures)]))
    return page


def resolve(gaps: Sequence[float]) -> tuple[float, float | None, str]:
    """Mean, standard error (None for fewer than 2) and verdict of a claim's paired gaps over seeds.

    The verdict is "yes", "no" (the opposite is significant) or, always for fewer than 3 gaps, "not
    resolved".
    """
    mean, stderr, n, _ = _statistics(gaps).values()
    if n < FEWEST_SEEDS or not abs(mean) > t_quantile(n - 1) * stderr:
        return mean, stderr, "not resolved"
    return mean, stderr, "yes" if mean > 0 else "no"


def t_quantile(df: int) -> float:
    """The t that Student's T with ``df`` >= 1 degrees of freedom stays within, in 95 % of cases.

    With T = sqrt(df) tan(a), the density of the angle a is proportional to cos(a) ** (df - 1).
    """

    def mass_up_to(cut: int) -> float:
        angle = cut * math.pi / 2**53
        total = angle if df % 2 else math.sin(angle)
        for k in range(3 - df % 2, df, 2):  # the integral of cos ** k, by parts
            total = (math.cos(angle) ** (k - 1) * math.sin(angle) + (k - 1) * total) / k
        return total

    # Search a quarter of the circle, which is cut as finely as its numbers allow.
    cut = bisect_left(range(2**52), 0.95 * mass_up_to(2**52), key=mass_up_to)
    return math.sqrt(df) * math.tan(cut * math.pi / 2**53)


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    # Added one by one: the built-in sum rounds differently from Python 3.12 on.
    n = len(values)
    mean = reduce(operator.add, values, 0.0) / n if n else math.nan
    squares = reduce(operator.add, [(value - mean) * (value - mean) for value in values], 0.0)
    stderr = math.sqrt(squares / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "n": n, "values": list(values)}


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


def render_html(title: str, sections: Sequence[str]) -> str:
    """Render one self-contained page of parts that ``html_section`` made."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>\n{style}</style>'
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return f'<!doctype html>\n<html lang="en">{head}<h1>{escape(title)}</h1>\n{body}\n'


def html_section(document: Mapping[str, Any], figures: Sequence[Path] = ()) -> str:
    """Render a report's JSON with its PNG figures; raises OSError if one cannot be read."""
    # Numbers first, then what they mean.
    parts = []
    if document["rows"]:
        header, *rows = [map(escape, row) for row in _table_cells(document["rows"])]
        lines = ["<tr><th>" + "<th>".join(header), *("<tr><td>" + "<td>".join(row) for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
    for claim in document["claims"]:
        kind = claim["holds"] if claim["holds"] in ("yes", "no") else "open"
        parts.append(f'<p class="{kind}">{escape(_sentence(claim))}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in document.get("notes", ())]

    # Pictures are part of the page, so that it can be sent as one file.
    for figure in figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        image = f'<img alt="{escape(figure.stem)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(figure.stem)}</figcaption></figure>")
    return "\n".join([*parts, f"<footer>{escape(_origin(document))}</footer>"])


def _origin(document: Mapping[str, Any]) -> str:
    machine = {k: v for k, v in document["environment"].items() if k != "libraries"}
    machine |= document["environment"].get("libraries", {})
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    run = f"{document['package']} {document['version']}: {' '.join(document['command'])}"
    return f"{run} (seeds {document['seeds']}, {document['seconds']:.0f} s). {where}"


def _table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of a report's table, as text; metrics stand in the order they first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    cells = [["name", "setting", *names]]
    for row in rows:
        metrics = row["metrics"]
        numbers = [_number_text(**metrics[n]) if n in metrics else "" for n in names]
        cells.append([row["name"], row["setting"], *numbers])
    return cells


def _number_text(mean: Any, stderr: Any, **_: Any) -> str:
    """Mean with four digits and, where there is one, its standard error."""
    return f"{float(mean):.4g}" + ("" if stderr is None else f" ± {float(stderr):.2g}")


def _sentence(claim: Mapping[str, Any]) -> str:
    """A claim with its verdict and gap."""
    gap = _number_text(claim["value"], claim["stderr"])
    return f"{claim['holds']}: {claim['text']} (gap {gap})"


def without_paths(value: Any) -> Any:
    """Copy JSON values with absolute paths made relative or, outside the working folder, bare."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value) and "\n" not in value:  # a word of its own may hold spaces
        return _relative(value)
    return _PATH.sub(lambda match: _relative(match[0]), value)


def _relative(path: str) -> str:
    inside = Path(os.path.normpath(path)).is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else os.path.basename(os.path.normpath(path))


@dataclass(frozen=True)
class Summary:
    """Named values: a table for people, an object for ``--json``."""

    values: Mapping[str, Any]
    title: str = ""  # above the table
    note: str = ""  # a sentence below it
    shown: Mapping[str, str] = field(default_factory=dict)  # instead of the plain value, by name

    def to_json(self) -> dict[str, Any]:
        """The values in plain JSON types, without title and note."""
        return jsonable(self.values)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", title=self.title or None, show_header=False)
        for name, value in self.values.items():
            table.add_row(Text(name), Text(self.shown.get(name) or words(value)[:_LONGEST_CELL]))
        yield table
        if self.note:
            yield Text(self.note)
