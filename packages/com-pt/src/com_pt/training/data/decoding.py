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
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
    if content.startswith(UTF16_MARKS):
        raise InputError(f"{place}: the text is UTF-16, not UTF-8; {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"{place}: the text is not UTF-8 (byte 0x{byte:02X}); {remedy}") from error


def decode_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, with their line ends.

    Raises:
        InputError: If the file cannot be read, or a row is not UTF-8; names the row.
    """
    remedy = f"save it as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
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
        return [line.strip() for line in decode_lines(path) if line.strip()]

    # JSON must be a list of texts.
    with decoding(str(path), "check the file"):
        listed = decode_json(path.read_bytes(), str(path))
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InputError(f"{path}: no list of names; give a JSON list such as ['cat', 'dog']")
    return listed
