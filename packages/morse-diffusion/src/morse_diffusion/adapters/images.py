"""A folder of image files as tensors, with the captions beside them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from effml_common.errors import InputError
from effml_common.logging import warn

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_UNREADABLE = 0.01  # share of the images that is skipped; more of them stop the run


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The readable images of a folder.

    Attributes:
        images: Float32 [n, c, h, w] in [-1, 1].
        classes: Name of the sub-folder that each image is in; its own name without one.
        captions: One per image, empty where there is none; no entries if they were not read.
    """

    images: Tensor
    classes: list[str]
    captions: list[str]


def read_image_folder(
    folder: str, size: tuple[int, int], channels: int, *, with_captions: bool
) -> ImageFolder:
    """Read all images below a folder, and their captions where they are needed.

    Args:
        folder: The folder.
        size: Height and width that the images are cut and resized to.
        channels: 1 for grey images, else RGB.
        with_captions: Whether to read captions.

    Raises:
        InputError: If there is no image, too many cannot be read, or a caption cannot be read.
    """
    images, files = read_images(image_files(folder), size, channels)
    return ImageFolder(
        images=images,
        classes=[path.relative_to(folder).parts[0] for path in files],
        captions=read_captions(files, folder) if with_captions else [],
    )


def image_files(folder: str) -> list[Path]:
    """List the images below a folder, in the order of their paths.

    Raises:
        InputError: If there are none.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder} holds no image; put {', '.join(SUFFIXES)} files there")
    return files


def read_images(
    files: list[Path], size: tuple[int, int], channels: int
) -> tuple[Tensor, list[Path]]:
    """Read images, cut each to the middle and resize it.

    Args:
        files: Image files.
        size: Height and width of the results.
        channels: 1 for grey images, else RGB.

    Returns:
        Images, float32 [n, c, h, w] in [-1, 1], and the files that could be read.

    Raises:
        InputError: If more than 1 % of them cannot be read.
    """
    images, readable = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                picture = image.convert("L" if channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError) as error:
            warn(f"skipped {path.name}: {error}")
            continue
        images.append(picture_tensor(picture, size))
        readable.append(path)

    if len(readable) < (1 - MOST_UNREADABLE) * len(files) or not readable:
        unreadable = len(files) - len(readable)
        raise InputError(f"{unreadable} of {len(files)} images cannot be read; repair the folder")
    return torch.stack(images), readable


def picture_tensor(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scale one image to cover (height, width) and cut it to that, [c, h, w] in [-1, 1]."""
    # Both sides must reach the wanted size; the longer one then stands over.
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    covering = (
        max(width, round(picture.width * scale)),
        max(height, round(picture.height * scale)),
    )
    if covering != picture.size:
        picture = picture.resize(covering, Image.Resampling.BICUBIC)

    # The middle of it.
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 127.5 - 1
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def read_captions(files: list[Path], folder: str) -> list[str]:
    """Read the captions of images, from ``metadata.jsonl`` or text files beside the images.

    Args:
        files: Images below ``folder``.
        folder: Where ``metadata.jsonl`` is looked for.

    Returns:
        One caption per file; empty where there is none.

    Raises:
        InputError: If a line of ``metadata.jsonl`` is not a caption.
    """
    listed = _listed_captions(Path(folder) / "metadata.jsonl")
    captions = []
    for path in files:
        beside = path.with_suffix(".txt")
        name = path.relative_to(folder).as_posix()
        if name in listed:
            captions.append(listed[name])
        else:
            captions.append(beside.read_text().strip() if beside.is_file() else "")
    return captions


def _listed_captions(listing: Path) -> dict[str, str]:
    """Return caption by file name; empty without the file."""
    if not listing.is_file():
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            captions[entry["file_name"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{listing} line {number} is not a caption ({error}); "
                'write {"file_name": "a.png", "text": "..."}'
            ) from error
    return captions
