"""Labelled images from a CSV of path and label."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from com_pt.training.data.captions import CaptionData, crop_range, image_transform, read_table
from effml_common.errors import InputError


def labelled_images(
    data: Mapping[str, Any], part: str, classes: int
) -> tuple[CaptionData, list[int]]:
    """Open the images and labels of ``data[part]``.

    Raises:
        InputError: If there are none, a file is missing, or a label is no number below ``classes``.
    """
    # The file that the settings name.
    source = data.get(part)
    if not source:
        raise InputError(
            f"no {part} data are given; name a CSV of path and label under data: {part}"
        )
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path} is not there; check data: {part}")
    places, texts = read_table(path, data.get("images"))
    if not places:
        raise InputError(f"{path} holds no samples; give a file with some")

    # Labels are numbers of classes.
    labels = []
    for number, (text, *_) in enumerate(texts, 2):
        if not text.strip().isdecimal() or int(text) >= classes:
            raise InputError(
                f"{path}, line {number}: the label {text!r} is no number below {classes}; correct it"
            )
        labels.append(int(text))

    # The first caption of a row is its label, which nobody tokenizes.
    transform: Callable[[Any], Tensor] = image_transform(
        data.get("image_size", 224),
        crop_range(data, (0.35, 1.0)) if part == "train" else None,
    )
    return CaptionData(places, texts, lambda _: None, transform, None), labels  # pyright: ignore
