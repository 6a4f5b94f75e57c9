"""Images with captions, wherever they are: tables, tars and data sets of Hugging Face."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from com_pt.training.data.huggingface import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    HuggingFacePictures,
    find_column,
    is_hugging_face,
    open_hugging_face,
)
from com_pt.training.data.labelling import Pictures
from com_pt.training.data.packed import FileBuffer, PackedTexts, TextBuffer
from com_pt.training.data.patterns import expand_paths
from com_pt.training.data.sentences import CaptionRule
from com_pt.training.data.shards import scan_shard
from com_pt.training.data.tables import check_file, read_rows
from effml_common.errors import ConfigError, InputError

ROWS_AT_ONCE = 1000  # rows of a data set that are read at once
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


def read_pairs(
    data: Mapping[str, Any], part: str, rule: CaptionRule
) -> tuple[Pictures, PackedTexts]:
    """Read the captions of a part, and where its pictures are.

    Args:
        data: ``train`` and ``val``; ``images``, the folder of paths; ``image_key`` and ``caption_key``,
            columns of a data set; ``caption_key`` also names the field of a json in a tar.
        part: ``train`` or ``val``.
        rule: Checks the captions of every image.

    Raises:
        InputError: If there are none, a file is missing, or a row or sample is wrong; names it.
    """
    source = data.get(part)
    if not source:
        raise InputError(
            f"no {part} data are given; name a CSV, TSV or tar, or a data set (hf:...), "
            f"under data: {part}"
        )
    if is_hugging_face(source):
        return _read_hugging_face(data, source, part, rule)

    # One file after the other.
    files, texts = FileBuffer(), TextBuffer()
    paths = expand_paths(source, f"data: {part}")
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"{path} is a folder without captions; name its table or tars under data: {part}"
            )
        if path.suffix.lower() in COMPRESSED:
            raise InputError(f"{path} is compressed; unpack it")
        if path.suffix.lower() == ".tar":
            _read_tar(path, data.get("caption_key"), rule, files, texts)
        else:
            _read_table(path, data, rule, files, texts)

    pictures = files.pack()
    if len(pictures) == 0:
        raise InputError(f"{paths[0]} holds no samples; give a file with some")
    return pictures, texts.pack()


def _read_table(
    path: Path, data: Mapping[str, Any], rule: CaptionRule, files: FileBuffer, texts: TextBuffer
) -> None:
    """Read a table; all columns behind the path are captions."""
    if data.get("caption_key"):
        raise ConfigError(
            f"caption_key is {data['caption_key']}, but all columns of {path} are captions; "
            "leave it out"
        )
    root = Path(data["images"]) if data.get("images") else path.parent
    for row, (file, *captions) in read_rows(path, "captions"):
        check_file(path, row, file, root / file)
        texts.append(rule.accept(captions, f"{path}, row {row}"))
        files.append(root / file)


def _read_tar(
    path: Path, key: str | None, rule: CaptionRule, files: FileBuffer, texts: TextBuffer
) -> None:
    """Read the captions of a shard, and where its images are."""
    index = scan_shard(path)
    for number in range(len(index)):
        texts.append(rule.accept(index.captions(number, key), index.where(number)))
        files.append(path, *index.places[number, 0].tolist())


def _read_hugging_face(
    data: Mapping[str, Any], source: str | Path, part: str, rule: CaptionRule
) -> tuple[Pictures, PackedTexts]:
    # The columns: one of images, and one or several of captions or lists of captions.
    dataset = open_hugging_face(source, part)
    image = find_column(dataset, data.get("image_key"), IMAGE_NAMES, "Image", "image")
    keys = data.get("caption_key")
    columns = [
        find_column(dataset, key, CAPTION_NAMES, "", "caption")
        for key in (keys if isinstance(keys, Sequence) and not isinstance(keys, str) else [keys])
    ]
    pictures = HuggingFacePictures(dataset, image, source)
    if len(pictures) == 0:
        raise InputError(f"{source} holds no samples; give a split with some")

    # The captions are packed like those of a file, which checks them all.
    texts = TextBuffer()
    for rows in dataset.select_columns(columns).iter(batch_size=ROWS_AT_ONCE):
        for cells in zip(*(rows[column] for column in columns), strict=True):
            place = f"{source}, row {len(texts.list_ends) - 1}"
            captions = [text for cell in cells for text in _texts_of(cell, place)]
            texts.append(rule.accept(captions, place))
    return pictures, texts.pack()


def _texts_of(cell: Any, place: str) -> list[str]:
    texts = [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{place}: the caption is {cell!r}, no text; name another column with caption_key"
        )
    return texts
