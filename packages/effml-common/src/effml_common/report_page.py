"""The HTML page of one or several reports, without any outside resource."""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_PATH = re.compile(r"""(?<![\w/.~)\]}-])/(?=[^\s/])[^\s"'<>,;:|)\]}]*""")


@dataclass(frozen=True)
class Section:
    """One part of a page: a report's JSON with its PNG figures, or the error that prevented it."""

    name: str
    document: Mapping[str, Any] | None = None
    figures: Sequence[Path] = ()
    error: str = ""


def render_html(title: str, sections: Sequence[Section]) -> str:
    """Render one self-contained page.

    Raises:
        OSError: If a figure cannot be read.
    """
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>\n{style}</style>'
    body = "\n".join(f"<section>{_section(section)}</section>" for section in sections)
    return f'<!doctype html>\n<html lang="en">{head}<h1>{escape(title)}</h1>\n{body}\n'


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.name)}</h2>"] if section.name else []
    if section.error:
        parts.append(f'<pre class="error">{escape(without_paths(section.error))}</pre>')

    # Numbers first, then what they mean.
    document = section.document or {"rows": [], "claims": []}
    if document["rows"]:
        header, *rows = [map(escape, row) for row in table_cells(document["rows"])]
        lines = ["<tr><th>" + "<th>".join(header), *("<tr><td>" + "<td>".join(row) for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
    for claim in document["claims"]:
        kind = claim["holds"] if claim["holds"] in ("yes", "no") else "open"
        parts.append(f'<p class="{kind}">{escape(sentence(claim))}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in document.get("notes", ())]

    # Pictures are part of the page, so that it can be sent as one file.
    for figure in map(Path, section.figures):
        data = base64.b64encode(figure.read_bytes()).decode()
        image = f'<img alt="{escape(figure.stem)}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{escape(figure.stem)}</figcaption></figure>")
    if section.document:
        parts.append(f"<footer>{escape(_origin(section.document))}</footer>")
    return "\n".join(parts)


def _origin(document: Mapping[str, Any]) -> str:
    machine = {k: v for k, v in document["environment"].items() if k != "libraries"}
    machine |= document["environment"].get("libraries", {})
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    run = f"{document['package']} {document['version']}: {' '.join(document['command'])}"
    return f"{run} (seeds {document['seeds']}, {document['seconds']:.0f} s). {where}"


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of a report's table, as text; metrics stand in the order they first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    cells = [["name", "setting", *names]]
    for row in rows:
        metrics = row["metrics"]
        numbers = [number_text(**metrics[n]) if n in metrics else "" for n in names]
        cells.append([row["name"], row["setting"], *numbers])
    return cells


def number_text(mean: Any, stderr: Any, **_: Any) -> str:
    """Mean with four digits and, where there is one, its standard error."""
    return f"{float(mean):.4g}" + ("" if stderr is None else f" ± {float(stderr):.2g}")


def sentence(claim: Mapping[str, Any]) -> str:
    """A claim with its verdict and gap."""
    gap = number_text(claim["value"], claim["stderr"])
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
