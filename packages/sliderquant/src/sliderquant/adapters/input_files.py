"""Texts that a user names: each is opened once per run, parsed, and remembered by what was read.

A file is one text in UTF-8, an array of records (``.json``) or one record per line (``.jsonl``,
``.ndjson``). A record is an object with ``text`` or chat ``messages``. A data set of the datasets
library gives records, too, see ``data_sets``. Whatever a decoder or parser raises becomes one line that
names the file and the place in it.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters import data_sets
from sliderquant.adapters.processes import started_processes
from sliderquant.adapters.reasons import reason_of

JSON_LINES = (".jsonl", ".ndjson")
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_TO_RECORDS = "write its text as JSON lines (.jsonl) with 'text'"
_UNPACK = "unpack it first"
_TO_TEXT = "give its text as a .txt file"
_REFUSED_ENDINGS = {
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".csv", ".tsv"), _TO_RECORDS),
    **dict.fromkeys((".xls", ".xlsx", ".db", ".sqlite"), _TO_RECORDS),
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".7z"), _UNPACK),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub"), _TO_TEXT),
    **dict.fromkeys((".bin", ".pt", ".pth", ".pkl", ".npy", ".npz"), _TO_TEXT),
    **dict.fromkeys((".safetensors", ".gguf"), _TO_TEXT),
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document of an input file.

    Attributes:
        value: An object with ``text`` (a string) or ``messages`` (a list).
        place: File, and line or record in it, for messages.
    """

    value: Mapping[str, Any]
    place: str


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """What was read from a file or data set.

    Attributes:
        name: Bare name, with as many folders as tell it from the others of its list.
        path: As the user gave it.
        sha256: Of the bytes that were read; of a data set, of its records as JSON lines.
        size: Number of those bytes.
        records: Its documents.
    """

    name: str
    path: str
    sha256: str
    size: int
    records: tuple[Record, ...]


class InputFiles:
    """The input files of one run; each is opened once, also where several settings name it."""

    def __init__(self) -> None:
        self._read: dict[str, InputFile] = {}

    def read(
        self, paths: Sequence[str], setting: str = "files", beside: Sequence[str] = ()
    ) -> list[InputFile]:
        """Read the files that one setting names.

        Args:
            paths: Files, pipes, folders that ``Dataset.save_to_disk`` wrote, or ``hf:`` names of data
                sets. ``~`` is the home folder, and a path that exists wins over a name.
            setting: Its name, for messages.
            beside: Paths of other settings, from which the files are told apart by name, too.

        Raises:
            InputError: If something cannot be used, or is given twice.
        """
        # An empty path would be the working folder, and the very same file would count twice.
        if "" in paths:
            raise InputError(f"{setting} names a file without a name; give its path")
        keys = [_identity(path) for path in paths]
        for number, key in enumerate(keys):
            if (first := keys.index(key)) < number:
                same = "" if paths[first] == paths[number] else f" (as {paths[first]})"
                raise InputError(f"{setting} names {paths[number]} twice{same}; give it once")

        for path, key in zip(paths, keys, strict=True):
            if key not in self._read:
                self._read[key] = _read_input(path)
        names = distinct_names([*paths, *beside])[: len(paths)]
        return [
            replace(self._read[key], name=name, path=path)
            for path, key, name in zip(paths, keys, names, strict=True)
        ]


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the bare names of paths, with the fewest folders in front that tell them apart.

    >>> distinct_names(["a/x.txt", "b/x.txt", "b/y.txt"])
    ['a/x.txt', 'b/x.txt', 'y.txt']
    """
    all_parts = [_parts(path) for path in paths]
    names = []
    for own in all_parts:
        others = [parts for parts in all_parts if parts != own]
        count = 1
        while count < len(own) and any(parts[-count:] == own[-count:] for parts in others):
            count += 1
        names.append("/".join(own[-count:]))
    return names


def _parts(path: str) -> tuple[str, ...]:
    """Return the folders and the name of a path, without its root; a data set is one name."""
    if _names_data_set(path):
        return (path,)
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    return whole.relative_to(whole.anchor).parts or (path,)


def _names_data_set(path: str) -> bool:
    return path.startswith(data_sets.PREFIX) and not os.path.lexists(path)


def _identity(path: str) -> str:
    """Return what is the same for all names of one file."""
    return path if _names_data_set(path) else os.path.realpath(os.path.expanduser(path))


def _read_input(path: str) -> InputFile:
    """Open one file or data set, this once."""
    # Data sets come as records.
    place = Path(os.path.expanduser(path))
    if _names_data_set(path):
        return _from_rows(path, data_sets.read_named(path))
    if place.is_dir():
        return _from_rows(path, data_sets.read_saved(place))

    # A file is known by its ending before a byte of it is read.
    ending = place.suffix.lower()
    if remedy := _REFUSED_ENDINGS.get(ending):
        raise InputError(f"{path}: a file of the kind {ending} is not read as text; {remedy}")
    if (count := started_processes()) > 1 and place.exists() and not place.is_file():
        raise InputError(  # each of them would get a part of what a pipe holds
            f"{path} is no file on a disk, and {count} processes read it; write its text to a file"
        )
    try:
        data = place.read_bytes()
    except OSError as error:
        remedy = "check the path"
        if isinstance(error, FileNotFoundError):
            remedy += f", or write {data_sets.PREFIX}NAME for a data set"
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from None

    # What the ending says about the form holds for the whole file.
    text = _decode(data, path)
    if ending in JSON_LINES:
        records = _json_lines(text, path)
    elif ending == ".json":
        records = _json_array(text, path)
    else:
        records = [Record(value={"text": text}, place=path)]
        _warn_of_json(text, path)
    return InputFile(
        name=place.name,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        records=tuple(records),
    )


def _from_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> InputFile:
    """Return the rows of a data set as records, and the hash of what was read."""
    records = [_checked(row, f"{path} (row {number})") for number, row in enumerate(rows, start=1)]
    lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    data = "".join(lines).encode()
    digest = hashlib.sha256(data).hexdigest()
    return InputFile(name=path, path=path, sha256=digest, size=len(data), records=tuple(records))


def _decode(data: bytes, path: str) -> str:
    """Return UTF-8 text without its byte order mark.

    Raises:
        InputError: If the bytes are something else.
    """
    # Other encodings name themselves by their marks; zeros are in no text.
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{path} is {encoding} text, not UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} (line {line}): not UTF-8 text ({error.reason}); convert it, or give a text file"
        ) from None
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        raise InputError(f"{path} (line {line}): a zero byte, so it is no text; give a text file")
    return text


def _json_lines(text: str, path: str) -> list[Record]:
    """Parse one record per line; only a line feed ends a line, as JSON strings hold other breaks."""
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value = _parse_json(line, path, "write one object per line", line=number)
            records.append(_checked(value, f"{path} (line {number})"))
    return records


def _json_array(text: str, path: str) -> list[Record]:
    """Parse a file that is one array of records, or one record."""
    value = _parse_json(
        text, path, "write one array of records, or name it .jsonl if each line is one"
    )
    if not isinstance(value, list):
        return [_checked(value, path)]
    return [
        _checked(entry, f"{path} (record {number})") for number, entry in enumerate(value, start=1)
    ]


def _parse_json(text: str, path: str, remedy: str, line: int | None = None) -> Any:
    """Parse JSON; ``line`` is that of the text in its file, where it is one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number, reason = line or error.lineno, f"no JSON ({error.msg})"
        raise InputError(f"{path} (line {number}): {reason}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        place = f"{path} (line {line})" if line else path
        raise InputError(
            f"{place}: JSON that cannot be read ({reason_of(error)}); {remedy}"
        ) from None


def _checked(value: Any, place: str) -> Record:
    """Return a record that has ``text`` or ``messages``."""
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), str):
            return Record(value=value, place=place)
        if isinstance(value.get("messages"), list):
            _check_messages(value["messages"], place)
            return Record(value=value, place=place)
    raise InputError(
        f"{place}: neither 'text' nor 'messages' in it; give records with a string or a list of them"
    )


def _check_messages(messages: Sequence[Any], place: str) -> None:
    """Refuse messages of another layout: chat templates write nothing for a key that is not there."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(
                f"{place}: message {number} has no 'role'; give objects with 'role' and 'content'"
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise InputError(
                f"{place}: message {number} has no 'content'; give objects with 'role' and 'content'"
            )


def _warn_of_json(text: str, path: str) -> None:
    """Say so where a plain text, as from a pipe, looks like records, which its ending would tell."""
    # One record per line, or one array: nothing else in a file of records begins like this.
    start = text.lstrip()[:1]
    kind, ending = ("a JSON array", ".json") if start == "[" else ("JSON lines", ".jsonl")
    first = text if start == "[" else text.lstrip().partition("\n")[0]
    if start not in ("{", "["):
        return
    try:
        value = json.loads(first)
        _checked(value[0] if isinstance(value, list) else value, path)
    except (ValueError, RecursionError, IndexError):  # an InputError is a ValueError
        return
    warn(f"{path} is read as one plain text, but looks like {kind}; name it {ending} if it is")
