"""WebDataset shards: tars in which the files of a sample share a name up to its first dot.

A shard is scanned for the places of its members and never unpacked, so that member names that are
absolute, or climb up with .., do no harm.
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_pt.training.data.decoding import (
    IMAGE_EXTENSIONS,
    decode_json,
    decode_text,
    decoding,
    kind_of,
)
from com_pt.training.data.packed import PackedTexts
from effml_common.errors import InputError
from effml_common.logging import warn

PARTS = ("image", ".txt", ".json")  # of a sample that are read
TAIL_CHECKED = 2**20  # bytes behind the end of a tar that must be empty
COMPRESSORS = {
    "compressed with gzip": "gzip",
    "compressed with bzip2": "bzip2",
    "compressed with xz": "xz",
    "compressed with zstd": "zstd",
}
LONGEST_VALUE = 40  # characters of a wrong value that are shown


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are.

    Attributes:
        path: Of the tar.
        keys: Name of each sample.
        places: Offset and size in bytes of its image, txt and json; int64 [n, 3, 2], -1 for none.
    """

    path: Path
    keys: PackedTexts
    places: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, number: int) -> str:
        """Return what a sample is called in messages."""
        return f"{self.path}, sample {self.keys[number][0]}"

    def image(self, number: int) -> bytes:
        """Read the bytes of a sample's image."""
        with decoding(self.where(number), "make the shard again"):
            content = self._read(number, 0)
        return content or b""

    def captions(self, number: int, key: str | None) -> list[str]:
        """Read the captions of a sample.

        Args:
            number: Of the sample.
            key: Field of the json that holds them; None takes the usual places.

        Raises:
            InputError: If there are none, or the field is no text and no list of texts.
        """
        place = self.where(number)
        with decoding(place, "make the shard again"):
            text, record = (self._read(number, part) for part in (1, 2))
        return parse_captions(text, record, place, key)

    def _read(self, number: int, part: int) -> bytes | None:
        offset, size = self.places[number, part].tolist()
        if offset < 0:
            return None
        with open(self.path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the file has become shorter")
        return content


def scan_shard(path: Path) -> ShardIndex:
    """Find the samples of a shard from its headers; the order of a sample's files does not matter.

    Texts without an image are left out with a warning.

    Raises:
        InputError: If the tar is damaged, has no images, or a sample has a part twice.
    """
    _require_tar(path)
    samples = _places_by_sample(path)

    # Images whose names have more dots belong to no sample: an extension begins at the first dot.
    dotted = [
        key + kind
        for key, parts in samples.items()
        for kind in parts
        if kind.endswith(IMAGE_EXTENSIONS)
    ]
    if dotted:
        raise InputError(
            f"{path}: {len(dotted)} images have a dot within their names, such as {dotted[0]}; "
            "rename them, since a sample's name ends at the first dot"
        )

    # Texts beside which no image of a known kind stands.
    lone = [key for key, parts in samples.items() if "image" not in parts and _has_text(parts)]
    complete = {key: parts for key, parts in samples.items() if "image" in parts}
    if lone:
        others = [kind for kind in samples[lone[0]] if kind not in PARTS]
        beside = f", only {', '.join(others)}" if others else ""
        message = (
            f"{path}: {len(lone)} of {len(samples)} samples have no image "
            f"({', '.join(IMAGE_EXTENSIONS)}), such as {lone[0]}{beside}"
        )
        if not complete:
            raise InputError(f"{message}; convert the images")
        warn(f"{message}; they are left out")

    # Compactly, as a long run visits many.
    missing = (-1, 0)
    places = [[parts.get(kind, missing) for kind in PARTS] for parts in complete.values()]
    keys = PackedTexts.of([key] for key in complete)
    return ShardIndex(path, keys, torch.tensor(places, dtype=torch.int64).reshape(-1, 3, 2))


def _places_by_sample(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return offset and size of each file of each sample."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with (
        decoding(f"{path}: no complete tar", "copy it or make it again"),
        tarfile.open(path, "r:") as tar,
    ):
        for member in tar:
            if member.issparse() or member.islnk():
                what = "sparse" if member.issparse() else "a hard link"
                raise ValueError(f"{member.name} is {what} and would be read wrongly or not at all")

            # macOS hides a shadow of each file beside it, ._cat.jpg.
            if member.isreg() and not member.name.rpartition("/")[2].startswith("._"):
                key, kind = _split_name(member.name)
                parts = samples.setdefault(key, {})
                if kind in parts and kind in PARTS:
                    what = "images" if kind == "image" else f"files {kind}"
                    raise InputError(f"{path}, sample {key}: two {what}; give each sample a name")
                parts[kind] = (member.offset_data, member.size)
        _check_tail(path, tar.offset)
    return samples


def _require_tar(path: Path) -> None:
    """Refuse another kind of file: one that is compressed has no places to read samples from."""
    kind = kind_of(path)
    if kind not in (None, "a tar"):
        tool = COMPRESSORS.get(kind or "")
        remedy = f"unpack it: {tool} -d < OLD.tar > NEW.tar" if tool else "give a tar"
        raise InputError(f"{path} is no plain tar but {kind}; {remedy}")


def _has_text(parts: dict[str, Any]) -> bool:
    return ".txt" in parts or ".json" in parts


def _split_name(name: str) -> tuple[str, str]:
    """Return the sample of a member and its kind: ``image``, or the extension."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    key, extension = f"{folder}/{stem}" if folder else stem, f".{extension.lower()}"
    return key, "image" if extension in IMAGE_EXTENSIONS else extension


def _check_tail(path: Path, end: int) -> None:
    """Refuse a tar without an end, or with something behind it.

    One that was cut between two members, or has a damaged header, ends in silence.
    """
    with open(path, "rb") as file:
        file.seek(end)
        tail = file.read(TAIL_CHECKED)
        if not tail:
            raise ValueError("its end is missing")
        if tail.strip(b"\0"):
            raise ValueError(f"a header is damaged, or two tars are joined, at byte {end}")


def parse_captions(
    text: bytes | None, record: bytes | None, place: str, key: str | None
) -> list[str]:
    """Return the captions of a sample.

    They are the list ``captions`` of the json; without it the lines of the txt; without that the text
    ``caption`` of the json. Beside a txt the json may thus hold nothing but metadata.

    Args:
        text: Content of the txt; None without one.
        record: Content of the json; None without one.
        place: Name of the sample, for the message.
        key: Field of the json to take instead.

    Raises:
        InputError: If there are none, or the field is no text and no list of texts.
    """
    # A field of the json.
    if record is not None:
        fields = decode_json(record, place)
        if not isinstance(fields, dict):
            raise InputError(f"{place}: the json is no object with fields; write one")
        fallback = ("captions",) if text is not None else ("captions", "caption")
        for name in (key,) if key else fallback:
            if name in fields and (key or text is None or fields[name] is not None):
                return _require_texts(fields[name], name, place)

    # Or the lines of the txt.
    if key:
        raise InputError(f'{place}: no json has the field "{key}"; change caption_key')
    if text is not None:
        return decode_text(text, place).splitlines()
    if record is not None:
        raise InputError(
            f'{place}: the json has no "caption"; add a .txt file or name the field with caption_key'
        )
    raise InputError(f"{place}: no caption; add a .txt or .json file")


def _require_texts(value: Any, name: str, place: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        shown = json.dumps(value)[:LONGEST_VALUE]
        raise InputError(f"{place}: {name} is {shown}; give a text or a list of texts")
    return texts
