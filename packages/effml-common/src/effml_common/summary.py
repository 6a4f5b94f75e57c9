"""A short table of named values, which most commands that describe something return."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from effml_common.logging import jsonable

_LONGEST_CELL = 300  # characters, so that one value does not fill the terminal


@dataclass(frozen=True)
class Summary:
    """Named values: a table for people, an object for ``--json``.

    Args:
        values: What was found out, by name.
        title: Heading of the table.
        note: A sentence below the table.
        shown: Text for cells that should not show the plain value, by name.
    """

    values: Mapping[str, Any]
    title: str = ""
    note: str = ""
    shown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The values in plain JSON types, without title and note."""
        return jsonable(self.values)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", title=self.title or None, show_header=False)
        for name, value in self.values.items():
            table.add_row(Text(name), Text(self.shown.get(name) or cell(value)))
        yield table
        if self.note:
            yield Text(self.note)


def cell(value: Any) -> str:
    """The text of one value: numbers with four digits, lists and mappings on one line."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(cell, value))
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text[:_LONGEST_CELL]
