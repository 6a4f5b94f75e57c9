"""Folders of class folders, as torchvision's ``ImageFolder`` reads them."""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from effml_common.errors import InputError

# Names of the folder of a part that users take for one another.
SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test")}


def find_classes(source: str | Path, part: str) -> tuple[Path, list[str]]:
    """Return the folder of a part and its class folders in alphabetical order.

    Args:
        source: Folder of class folders, or of a folder for each part.
        part: ``train`` or ``val``.

    Raises:
        InputError: If there are none, or one is empty.
    """
    # The part may have a folder of its own.
    root = Path(source)
    parts = [root / name for name in SPELLINGS.get(part, (part,)) if (root / name).is_dir()]
    others = [name for names in SPELLINGS.values() for name in names if (root / name).is_dir()]
    if not parts and others:
        raise InputError(f"{root} has no folder {part}; add it, or name another under data: {part}")
    folder = parts[0] if parts else root

    # A class without pictures would be a label that nothing has.
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise InputError(f"{folder} has no class folders; put the images of a class into one")
    for name in names:
        if next(class_files(folder / name), None) is None:
            raise InputError(f"class folder {folder / name} has no images; add some or remove it")
    return folder, names


def class_files(folder: Path) -> Iterator[str]:
    """Yield the paths of the pictures of a class in torchvision's order."""
    for place, _, files in sorted(os.walk(folder, followlinks=True)):
        for file in sorted(files):
            if file.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(place, file)
