"""Rows of CSV and tab-separated tables: a path, then captions or a label.

A comma-separated cell may be quoted, as spreadsheets write it, within one line. Tabs need no quotes, so
that a caption may begin with one.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from com_pt.training.data.decoding import IMAGE_EXTENSIONS, decode_lines, decoding
from effml_common.errors import InputError

TAB_EXTENSIONS = (".tsv", ".tab")
ROWS_CHECKED = 1000  # rows at the top of a table whose pictures are looked for


def read_rows(path: Path, columns: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row and its cells; the header, which is row 1, is checked and left out.

    Args:
        path: The file, UTF-8.
        columns: What stands in them, such as "captions", for the message.

    Raises:
        InputError: If there is no header, or a row is damaged or of another length; names the row.
    """
    # A tab in the header tells the kind of file, whatever its name.
    header = next(decode_lines(path), "")
    if "\r" in header.rstrip("\r\n"):
        raise InputError(
            f"{path}: rows end with a lone carriage return, as on old Macs; convert it: "
            f"tr '\\r' '\\n' < {path.name}"
        )
    if "\0" in header:
        raise InputError(
            f"{path}, row 1: the text has zero bytes, as UTF-16 has without a mark; save it as UTF-8"
        )
    tabs = path.suffix.lower() in TAB_EXTENSIONS or "\t" in header
    rows = _split_at_tabs(path) if tabs else _split_at_commas(path)

    # The header has the number of columns that every row must have.
    _, names = next(rows, (1, []))
    if len(names) < 2:
        raise InputError(
            f"{path} has no header with a path and {columns}; add one, separated by commas or tabs"
        )
    if names[0].strip().lower().endswith(IMAGE_EXTENSIONS):
        raise InputError(
            f"{path}, row 1: {names[0]} is a picture, and the first row is the header; "
            f"add one, such as path and {columns}, above it"
        )
    for number, cells in rows:
        if len(cells) != len(names):
            raise InputError(
                f"{path}, row {number}: {len(cells)} columns, not {len(names)}; correct the row"
            )
        if "://" in cells[0]:
            raise InputError(
                f"{path}, row {number}: {cells[0]} is an address; "
                "download the images and give their paths"
            )
        yield number, cells


def _split_at_commas(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield row numbers and cells; refuse a cell that runs over several lines.

    A quote that is never closed would swallow the rows below it in silence.
    """
    rows = csv.reader(decode_lines(path), strict=True)
    while True:
        number = rows.line_num + 1
        with decoding(f"{path}, row {number}", "double or remove the quotes within the cell"):
            cells = next(rows, None)
        if cells is None:
            return
        if rows.line_num > number:
            raise InputError(
                f"{path}, row {number}: a quoted cell runs on to row {rows.line_num}; "
                "close the quote, and write each caption on one line"
            )
        if cells:
            yield number, cells


def _split_at_tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(decode_lines(path), 1):
        line = line.rstrip("\r\n")
        if line:
            yield number, [_unquote(cell) for cell in line.split("\t")]


def _unquote(cell: str) -> str:
    """Return a cell without quotes if a CSV writer put them: around it all, and doubled within."""
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"':
        return cell
    inside = cell[1:-1].replace('""', "")
    return cell if '"' in inside else cell[1:-1].replace('""', '"')


def check_file(table: Path, row: int, cell: str, picture: Path) -> None:
    """Refuse a row whose picture is not there: of the first 1,000 rows, and of every thousandth below.

    Looking for millions takes minutes on a file system in the network, for every process. One that is
    missed here is an unreadable sample later on.

    Raises:
        InputError: Naming the row.
    """
    if (row <= ROWS_CHECKED or row % ROWS_CHECKED == 0) and not picture.is_file():
        raise InputError(
            f"{table}, row {row}: {cell} is not there; correct the path or data: images"
        )
