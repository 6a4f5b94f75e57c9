"""Labels in their source's own words: of tables, class folders and data sets of Hugging Face."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from com_pt.training.data.folders import class_files, find_classes
from com_pt.training.data.huggingface import (
    IMAGE_NAMES,
    LABEL_NAMES,
    HuggingFacePictures,
    find_column,
    is_hugging_face,
    open_hugging_face,
)
from com_pt.training.data.packed import FileBuffer
from com_pt.training.data.patterns import expand_paths
from com_pt.training.data.tables import check_file, read_rows
from effml_common.errors import InputError


class Pictures(Protocol):
    """Undecoded pictures, wherever they are."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what a picture is called in messages."""
        ...

    def content(self, index: int) -> bytes:
        """Read the bytes of a picture."""
        ...


@dataclass(frozen=True)
class Labelling:
    """Pictures with labels in their source's own words.

    Attributes:
        source: What the settings call it.
        pictures: Undecoded pictures.
        labels: Index of each picture's class among ``names``, int32 [n].
        names: The classes that the source has.
        where: From the index of a class to the place where it is met first.
        is_complete: Whether the source lists all classes, as folders do; a table may lack some.
        has_numbers: Whether the names are the numbers of classes.
    """

    source: str
    pictures: Pictures
    labels: Tensor
    names: list[str]
    where: Callable[[int], str]
    is_complete: bool
    has_numbers: bool


def read_labelling(data: Mapping[str, Any], part: str) -> Labelling:
    """Read the labels of a part, and where its pictures are.

    Raises:
        InputError: If there are none, a file is missing or a row is wrong.
    """
    source = data.get(part)
    if not source:
        raise InputError(
            f"no {part} data are given; name a CSV of path and label, a folder of class folders "
            f"or a data set (hf:...) under data: {part}"
        )
    if is_hugging_face(source):
        return _read_hugging_face(data, source, part)
    if lists_classes(source):
        return _read_folders(source, part)
    return _read_tables(expand_paths(source, f"data: {part}"), data.get("images"))


def lists_classes(source: Any) -> bool:
    """Return whether a source is a folder or a data set, which know their classes."""
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    return is_folder or is_hugging_face(source)


def read_names_of(data: Mapping[str, Any], part: str) -> tuple[list[str], bool]:
    """Return the classes of a part, and whether they are numbers; folders are not listed for it."""
    source = data[part]
    if lists_classes(source) and not is_hugging_face(source):
        return find_classes(source, part)[1], False
    labelling = read_labelling(data, part)
    return labelling.names, labelling.has_numbers


def _read_tables(paths: list[Path], images: str | None) -> Labelling:
    # Labels become numbers in the order in which they are met.
    files, labels = FileBuffer(), array("i")
    numbers: dict[str, int] = {}
    places: list[str] = []
    for path in paths:
        root = Path(images) if images else path.parent
        for row, (file, label, *_) in read_rows(path, "labels"):
            label = canonical_label(label)
            if not label:
                raise InputError(f"{path}, row {row}: no label; add one, or leave the image out")
            if label not in numbers:
                numbers[label] = len(numbers)
                places.append(f"{path}, row {row}")
            check_file(path, row, file, root / file)
            files.append(root / file)
            labels.append(numbers[label])

    # In alphabetical order, or in that of the numbers.
    met = [*numbers]
    names = sorted(met, key=int) if have_numbers(met) else sorted(met)
    order = torch.tensor([names.index(name) for name in met], dtype=torch.int32)
    return Labelling(
        source=str(paths[0]),
        pictures=files.pack(),
        labels=order[torch.tensor(labels, dtype=torch.int64)],
        names=names,
        where=lambda number: places[numbers[names[number]]],
        is_complete=False,
        has_numbers=have_numbers(met),
    )


def have_numbers(names: Sequence[str]) -> bool:
    """Return whether all names are whole numbers of 0 or more."""
    return all(name.isascii() and name.isdecimal() for name in names)


def canonical_label(label: str) -> str:
    """Return a label without white space, and a number without leading zeros."""
    label = label.strip()
    return str(int(label)) if label.isascii() and label.isdecimal() else label


def _read_folders(source: str | Path, part: str) -> Labelling:
    folder, names = find_classes(source, part)
    files, labels = FileBuffer(), array("i")
    for number, name in enumerate(names):
        for file in class_files(folder / name):
            files.append(file)
            labels.append(number)
    return Labelling(
        source=str(folder),
        pictures=files.pack(),
        labels=torch.tensor(labels, dtype=torch.int32),
        names=names,
        where=lambda number: str(folder / names[number]),
        is_complete=True,
        has_numbers=False,
    )


def _read_hugging_face(data: Mapping[str, Any], source: str | Path, part: str) -> Labelling:
    # The two columns.
    dataset = open_hugging_face(source, part)
    image = find_column(dataset, data.get("image_key"), IMAGE_NAMES, "Image", "image")
    label = find_column(dataset, data.get("label_key"), LABEL_NAMES, "ClassLabel", "label")
    pictures = HuggingFacePictures(dataset, image, source)

    # Classes that the data set names, or the labels themselves.
    values = list(dataset[label])
    wrong = next((v for v in values if not isinstance(v, int | str | None)), None)
    if wrong is not None:
        raise InputError(
            f"{source}, row {values.index(wrong)}: the {label} is {wrong!r}, no number and no text; "
            "name another column with label_key"
        )
    listed = getattr(dataset.features[label], "names", None)
    if any(value is None or value == -1 for value in values):
        raise InputError(
            f"{source}: a row has no {label}; name another split with @, or leave it out"
        )
    values = [int(value) if isinstance(value, bool) else value for value in values]
    met = listed or sorted({*values})
    are_numbers = all(isinstance(value, int) for value in met)
    numbers = {value: number for number, value in enumerate(met)}
    labels = values if listed else [numbers[value] for value in values]
    return Labelling(
        source=str(source),
        pictures=pictures,
        labels=torch.tensor(labels, dtype=torch.int32),
        names=[str(name) for name in met],
        where=lambda number: f"{source}, column {label}",
        is_complete=not are_numbers,
        has_numbers=are_numbers,
    )
