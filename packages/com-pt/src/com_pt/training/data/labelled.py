"""Labelled images: a table of path and label, class folders, or a Hugging Face data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from com_pt.training.data.decoding import decode_picture, read_names
from com_pt.training.data.labelling import (
    Labelling,
    Pictures,
    canonical_label,
    have_numbers,
    lists_classes,
    read_labelling,
    read_names_of,
)
from effml_common.errors import InputError


class LabelledImages:
    """Images with one label each.

    Args:
        pictures: Undecoded pictures.
        labels: Index of each picture's class, int64 [n].
        classes: Names of the classes.
        transform: A picture to a tensor [3, h, w].
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Tensor,
        classes: list[str],
        transform: Callable[[Any], Tensor],
    ) -> None:
        self.pictures, self.labels, self.classes = pictures, labels, classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Read one image [3, h, w].

        Raises:
            InputError: If it cannot be decoded.
        """
        content, name = self.pictures.content(index), self.pictures.name(index)
        return self.transform(decode_picture(content, name))


def open_labelled(
    data: Mapping[str, Any], part: str, transform: Callable[[Any], Tensor]
) -> LabelledImages:
    """Open the labelled images of ``data[part]``.

    It names a CSV or TSV (or a list of them) of path and label, a folder of class folders, or a data set
    of Hugging Face (``hf:NAME[/config][@split]``, or its folder).

    Args:
        data: ``train`` and ``val``; ``images``, the folder of paths; ``classes``: their number, a list
            of names or a file of them; ``image_key`` and ``label_key``, columns of a data set. Without
            ``classes`` the classes are those of the training part, or of the part itself.
        part: ``train`` or ``val``.
        transform: A picture to a tensor [3, h, w].

    Raises:
        InputError: If there are no images, or a label is no class; names the row, folder or class.
    """
    # What is there, by the names that the source gives to its classes.
    found = read_labelling(data, part)
    if len(found.labels) == 0:
        raise InputError(f"{found.source} holds no samples; give a file with some")

    # The classes that the run has; labels are their names or numbers.
    classes = class_names(data, part, found)
    known = _numbers(classes) if _counts_classes(data, found, classes) else classes
    places = {canonical_label(name): place for place, name in enumerate(known)}
    places |= {name: place for place, name in enumerate(known)}
    for number, name in enumerate(found.names):
        if name not in places:
            are_numbers = known == _numbers(known)
            kind = f"number below {len(known)}" if are_numbers else "class"
            remedy = "correct it or add it to classes"
            if are_numbers:
                is_number = have_numbers([name])
                remedy = "correct it" if is_number else "list the names under data: classes"
            raise InputError(f"{found.where(number)}: the label {name!r} is no {kind}; {remedy}")
    order = torch.tensor([places[name] for name in found.names])
    return LabelledImages(found.pictures, order[found.labels.long()], classes, transform)


def _counts_classes(data: Mapping[str, Any], found: Labelling, classes: list[str]) -> bool:
    """Return whether labels are the places of classes, and not their names.

    Where classes are called by numbers, as in folders 0, 1, 10 and 2, label 2 is the name of the last.
    """
    is_named = have_numbers(classes) or not {*found.names}.isdisjoint(classes)
    return found.has_numbers and data.get("classes") is not None and not is_named


def class_names(data: Mapping[str, Any], part: str, found: Labelling | None = None) -> list[str]:
    """Return the names of a run's classes: those of the settings, or else of the training part.

    Args:
        data: Settings of the data.
        part: The part that is opened; it has the classes where there are no training data.
        found: That part, if it has been read.

    Raises:
        InputError: If names repeat, there are too many, or those of two parts differ.
    """
    found = found or read_labelling(data, part)
    setting: int | str | Sequence[str] | None = data.get("classes")

    # A number bounds them.
    if isinstance(setting, int):
        return _bounded_names(data, part, found, setting)

    # A list of names says what the classes are.
    if setting is not None:
        names = read_names(setting)
        twice = [] if found.has_numbers else [n for n in found.names if names.count(n) > 1]
        if twice:
            raise InputError(f"the class {twice[0]!r} is listed twice; name each class once")
        return names

    # Otherwise the data say it.
    return _same_names(data, part, found)


def _bounded_names(data: Mapping[str, Any], part: str, found: Labelling, number: int) -> list[str]:
    """Return numbers as the names, or the names of classes of which there may be ``number`` at most."""
    has_training = part != "train" and bool(data.get("train"))
    if not found.is_complete:
        # Folders or a data set to train on have given numbers to their classes already.
        if has_training and lists_classes(data["train"]):
            names, has_numbers = read_names_of(data, "train")
            if not has_numbers:
                return names
        return _numbers(range(number))
    if len(found.names) > number:
        raise InputError(
            f"{found.source} has {len(found.names)} classes, and classes is {number}; "
            "set data: classes"
        )

    # Without the training part nobody knows which of the classes a held-out part lacks.
    if part != "train" and not has_training and len(found.names) < number:
        raise InputError(
            f"{found.source} has {len(found.names)} classes and the model {number}; give --classes "
            "FILE, or data: classes, with the names of all of them, in the model's order"
        )
    return _same_names(data, part, found)


def _same_names(data: Mapping[str, Any], part: str, found: Labelling) -> list[str]:
    """Return the names of the training part, where there is one; a held-out part must have the same.

    The classes of each part are numbered by themselves: one that is missing would shift the labels.
    """
    names, has_numbers = found.names, found.has_numbers
    if part != "train" and data.get("train"):
        names, has_numbers = read_names_of(data, "train")
        if found.is_complete and {*names} != {*found.names}:
            unmatched = min({*names} ^ {*found.names})
            present, absent = ("train", part) if unmatched in names else (part, "train")
            raise InputError(
                f"class {unmatched} of {found.source} is in {present} but not in {absent}; "
                "both need the same classes"
            )
    return _numbers(range(max(map(int, names)) + 1)) if has_numbers else names


def _numbers(classes: Sequence[Any]) -> list[str]:
    """Return the numbers of classes, as names."""
    return [str(number) for number in range(len(classes))]
