"""The one place that decodes what users bring: text, tables' lines, JSON, names and pictures.

Whatever goes wrong becomes one ``InputError``: ``file (row or sample): why; what to do``.
"""

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from effml_common.errors import InputError
from effml_common.parsing import one_line

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L")  # Pillow's names of grey pictures of 16 bits
USUAL_ENCODING = "WINDOWS-1252"  # of spreadsheets that do not write UTF-8
WIDE_MARKS = {  # the longer ones first, since that of UTF-16 begins one of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

# How files begin that are no text, and what they are.
BEGINNINGS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file",
    b"PK\x03\x04": "a zip archive or a spreadsheet (xlsx)",
    b"\xd0\xcf\x11\xe0": "a spreadsheet of the old kind (xls)",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x80\x04\x95": "a pickle",
    b"\x93NUMPY": "an array of NumPy",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself (git lfs pull)",
}
REMEDIES = {
    "a tar": "name it .tar if it is a shard, or unpack it",
    "a Parquet file": "give its folder if it is a data set, or save it as CSV in UTF-8",
}
TAR_MARK = (b"ustar", 257)  # and where it stands
LONGEST_BEGINNING = 512


@contextmanager
def decoding(place: str, remedy: str) -> Iterator[None]:
    """Turn any failure of the body into one line.

    Args:
        place: What is decoded: a file, with its row or sample.
        remedy: What to do, as a clause.

    Raises:
        InputError: If the body fails; not where memory runs out.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        # Errors of the system carry number and file, which the place names already.
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):  # whose text is an address in memory
            why = "no picture of a known kind, or a damaged one"
        raise InputError(f"{place}: {one_line(why) or type(error).__name__}; {remedy}") from error


def decode_text(content: bytes, place: str, remedy: str = "save it as UTF-8") -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        InputError: If it is in another encoding.
    """
    wide = next((name for mark, name in WIDE_MARKS.items() if content.startswith(mark)), None)
    if wide:
        advice = remedy.replace(USUAL_ENCODING, wide)
        raise InputError(f"{place}: the text is {wide}, not UTF-8; {advice}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"{place}: the text is not UTF-8 (byte 0x{byte:02X}); {remedy}") from error


def kind_of(path: Path) -> str | None:
    """Return what a file is that is no text, by its first bytes; None if they tell nothing."""
    with decoding(str(path), "check the file"), open(path, "rb") as file:
        beginning = file.read(LONGEST_BEGINNING)
    mark, offset = TAR_MARK
    if beginning[offset:].startswith(mark):
        return "a tar"
    return next((kind for start, kind in BEGINNINGS.items() if beginning.startswith(start)), None)


def decode_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, with their line ends.

    Raises:
        InputError: If the file cannot be read or is no text, or a row is not UTF-8; names the row.
    """
    # Advice on encodings would be of no use.
    kind = kind_of(path)
    if kind is not None:
        is_compressed = kind.startswith("compressed")
        remedy = REMEDIES.get(kind, "unpack it" if is_compressed else "save it as text in UTF-8")
        raise InputError(f"{path} is no text but {kind}; {remedy}")

    remedy = f"save it as UTF-8, or convert it: iconv -f {USUAL_ENCODING} -t UTF-8 {path.name}"
    with decoding(str(path), "check the file"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield decode_text(line, f"{path}, row {number}", remedy)


def decode_json(content: bytes, place: str) -> Any:
    """Decode JSON.

    Raises:
        InputError: If it is no JSON.
    """
    text = decode_text(content, place)
    with decoding(f"{place}: no JSON", "correct it"):
        return json.loads(text)


def decode_picture(content: bytes, place: str) -> Image.Image:
    """Decode a picture as RGB: the first frame, without transparency, unrotated as in open_clip.

    Grey pictures of 16 bits keep their upper 8 bits; Pillow alone would turn most of them white.

    Raises:
        InputError: If it is damaged, of an unknown kind, or larger than Pillow's bound on pixels.
    """
    with (
        decoding(place, "replace the picture"),
        Image.open(io.BytesIO(content)) as picture,
    ):
        if picture.mode in SIXTEEN_BIT_MODES:
            return picture.convert("I").point(lambda value: value / 256).convert("RGB")

        # Pillow warns about transparent palettes unless they become RGBA first.
        if "transparency" in picture.info:
            return picture.convert("RGBA").convert("RGB")
        return picture.convert("RGB")


def read_names(names: str | Path | Sequence[str]) -> list[str]:
    """Return a list of names: itself, the lines of a text file that are not empty, or a JSON list.

    Raises:
        InputError: If the file cannot be read, or holds something else.
    """
    if not isinstance(names, str | Path):
        return [str(name) for name in names]
    path = Path(names)
    if path.suffix.lower() != ".json":
        # Old Macs ended lines with a carriage return.
        lines = [part.strip() for line in decode_lines(path) for part in line.split("\r")]
        return [line for line in lines if line]

    # JSON must be a list of texts.
    with decoding(str(path), "check the file"):
        listed = decode_json(path.read_bytes(), str(path))
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InputError(f"{path}: no list of names; give a JSON list such as ['cat', 'dog']")
    return listed
