"""Data sets of the Hugging Face library ``datasets``: by name, saved on disk, or Parquet files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from com_pt.training.data.decoding import decoding
from effml_common.errors import InputError
from effml_common.parsing import one_line

PREFIX = "hf:"
SPLITS = {"train": ("train", "training"), "val": ("validation", "val", "valid", "test")}
IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
LABEL_NAMES = ("label", "labels", "class", "fine_label", "target")
CAPTION_NAMES = ("caption", "captions", "text", "sentences", "txt")


def is_hugging_face(source: Any) -> bool:
    """Return whether a data setting names such a data set: ``hf:...``, or a folder of one."""
    if not isinstance(source, str | Path):
        return False
    if str(source).startswith(PREFIX):
        return True
    folder = Path(source)
    marks = ("dataset_info.json", "dataset_dict.json", "state.json")
    return folder.is_dir() and (
        any((folder / mark).is_file() for mark in marks) or next(_parquet(folder), None) is not None
    )


def open_hugging_face(source: str | Path, part: str) -> Any:
    """Open one split.

    Args:
        source: ``hf:NAME[/config][@split]``, or a folder of ``save_to_disk`` or of Parquet files.
        part: ``train`` or ``val``, which chooses the split unless the source names one.

    Raises:
        InputError: If the library or the network is missing, or there is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f'{source} needs the library datasets; pip install "com-pt[datasets]"'
        ) from error

    # The library fails in many ways; whatever happens, the source is named.
    name, _, split = str(source).removeprefix(PREFIX).partition("@")
    try:
        loaded = _load(datasets, name)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{source} cannot be loaded: {one_line(str(error)) or type(error).__name__}; "
            "check the name and the network, or give a folder"
        ) from error
    return _choose_split(loaded, source, part, split)


def _load(datasets: Any, name: str) -> Any:
    """Load a data set from a folder, or by its name: owner/name, and its configuration behind."""
    folder = Path(name)
    if folder.is_dir():
        files = [str(file) for file in _parquet(folder)]
        if not files:
            return datasets.load_from_disk(name)
        parts: dict[str, list[str]] = {}
        for file in files:
            parts.setdefault(_split_of(Path(file), folder), []).append(file)
        return datasets.load_dataset("parquet", data_files=parts)
    owner, *rest = name.split("/")
    address, config = "/".join([owner, *rest[:1]]), "/".join(rest[1:])
    return datasets.load_dataset(address, config or None)


def _split_of(file: Path, folder: Path) -> str:
    """Return the split of a Parquet file: its folder, or the first word of its name."""
    word = file.parent.name if file.parent != folder else file.stem.split("-")[0]
    spellings = {name for names in SPLITS.values() for name in names}
    first = file.stem.split("-")[0]
    return first if first in spellings else word if word in spellings else "train"


def _parquet(folder: Path) -> Iterator[Path]:
    return iter(sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]))


def _choose_split(loaded: Any, source: str | Path, part: str, split: str) -> Any:
    if not isinstance(loaded, Mapping):  # one split was saved alone
        if split:
            raise InputError(f"{source} has no splits; leave out @{split}")
        return loaded
    names = [split] if split else [name for name in SPLITS.get(part, (part,)) if name in loaded]
    if not names or names[0] not in loaded:
        missing = split or part
        raise InputError(
            f"{source} has no split {missing}; name one with @: {', '.join(map(str, loaded))}"
        )
    return loaded[names[0]]


def find_column(dataset: Any, key: Any, usual: Sequence[str], feature: str, purpose: str) -> str:
    """Return the column of a purpose: the one that the settings name, or the only likely one.

    Args:
        dataset: An open split.
        key: Value of the setting ``<purpose>_key``, or None.
        usual: Names that such a column often has.
        feature: Class of ``datasets`` that such columns often have.
        purpose: image, label or caption.

    Raises:
        InputError: If there is none; names the columns.
    """
    columns = list(dataset.column_names)
    if key is not None:
        if key not in columns:
            raise InputError(
                f"there is no column {key}; {purpose}_key is one of {', '.join(columns)}"
            )
        return key
    typed = [c for c in columns if type(dataset.features[c]).__name__ == feature]
    named = [name for name in usual if name in columns]
    if len(typed) == 1:
        return typed[0]
    if not named:
        raise InputError(
            f"no column looks like the {purpose}; set data: {purpose}_key to one of {', '.join(columns)}"
        )
    return named[0]


class HuggingFacePictures:
    """The pictures of a column, undecoded.

    Args:
        dataset: An open split.
        column: Its column of pictures.
        source: What the settings call it.
    """

    def __init__(self, dataset: Any, column: str, source: str | Path) -> None:
        from datasets import Image

        with decoding(f"{source}, column {column}", "set data: image_key to a column of images"):
            cast = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        self.cells, self.column, self.source = cast, column, source

    def __len__(self) -> int:
        return len(self.cells)

    def name(self, index: int) -> str:
        """Return what a picture is called in messages."""
        return f"{self.source}, row {index}"

    def content(self, index: int) -> bytes:
        """Read the bytes of a picture.

        Raises:
            InputError: If there are none.
        """
        with decoding(self.name(index), "replace the picture"):
            cell = self.cells[index][self.column]
            if cell is None:
                raise ValueError("no picture")
            return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
