"""Labelled images from a CSV of path and label."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from com_pt.data.captions import CaptionData, crop_of, image_transform, read_table
from effml_common.errors import InputError


def labelled_images(
    data: Mapping[str, Any], part: str, classes: int
) -> tuple[CaptionData, list[int]]:
    """Images and labels of ``data[part]``.

    Raises:
        InputError: If there are none, a file is missing, or a label is no number below ``classes``.
    """
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
    labels = []
    for number, (text, *_) in enumerate(texts, 2):
        if not text.strip().isdecimal() or int(text) >= classes:
            raise InputError(
                f"{path}, line {number}: the label {text!r} is no number below {classes}; correct it"
            )
        labels.append(int(text))
    transform: Callable[[Any], Tensor] = image_transform(
        data.get("image_size", 224),
        crop_of(data, (0.35, 1.0)) if part == "train" else None,
    )
    return CaptionData(places, texts, lambda _: None, transform, None), labels  # pyright: ignore
