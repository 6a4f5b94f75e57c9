"""A short table of named values, which most commands that describe something return."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from effml_common.logging import jsonable, words

_LONGEST_CELL = 300  # characters, so that one value does not fill the terminal


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
