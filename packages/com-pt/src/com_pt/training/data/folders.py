"""Folders of class folders, as torchvision's ``ImageFolder`` reads them."""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from com_pt.training.data.decoding import decoding
from effml_common.errors import InputError

# Names of the folder of a part that users take for one another.
SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "test")}
UNPACKER_FOLDER = "__MACOSX"  # that archives of macOS leave, with a shadow of each file


def find_classes(source: str | Path, part: str) -> tuple[Path, list[str]]:
    """Return the folder of a part and its class folders in alphabetical order.

    Hidden folders, such as ``.ipynb_checkpoints``, are no classes.

    Args:
        source: Folder of class folders, or of a folder for each part.
        part: ``train`` or ``val``.

    Raises:
        InputError: If there are none, or one is empty.
    """
    # The part may have a folder of its own.
    root = Path(source)
    spellings = [name for names in SPELLINGS.values() for name in names]
    others = [name for name in spellings if (root / name).is_dir()]
    if _are_classes(root, others):
        others = []
    parts = [root / name for name in SPELLINGS.get(part, (part,)) if name in others]
    if not parts and others:
        raise InputError(f"{root} has no folder {part}; add it, or name another under data: {part}")
    folder = parts[0] if parts else root

    # A class without pictures would be a label that nothing has.
    names = _subfolders(folder)
    if not names:
        raise InputError(f"{folder} has no class folders; put the images of a class into one")
    for name in names:
        if next(class_files(folder / name), None) is None:
            raise InputError(f"class folder {folder / name} has no images; add some or remove it")
    return folder, names


def _are_classes(root: Path, names: list[str]) -> bool:
    """Return whether folders that are named like parts are classes, such as trains among vehicles.

    They hold pictures themselves then, and so do folders beside them that have other names.
    """
    beside = [name for name in _subfolders(root) if name not in names] if names else []
    with decoding(str(root), "check the folder"):
        return bool(beside) and all(
            any(map(is_picture, os.listdir(root / name))) for name in (*names, *beside)
        )


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, but of hidden ones and links that lead back up."""
    here = (os.path.realpath(folder),)
    with decoding(str(folder), "check the folder"):
        names = [name for name in os.listdir(folder) if (folder / name).is_dir()]
    return sorted(name for name in names if _leads_on(os.path.join(folder, name), here))


def class_files(folder: Path) -> Iterator[str]:
    """Yield the paths of the pictures of a class in torchvision's order; hidden ones are left out.

    Raises:
        InputError: If a folder cannot be read.
    """
    for place, files in sorted(_walk(str(folder))):
        for file in sorted(files):
            if is_picture(file):
                yield os.path.join(place, file)


def is_picture(name: str) -> bool:
    """Return whether a file is a picture by its name; macOS hides a shadow of each, ``._cat.jpg``."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield all folders below a folder with their files; links are followed, but no loops of them."""
    # Where each folder to be visited really is, and those above it.
    chains: dict[str, tuple[str, ...]] = {folder: (os.path.realpath(folder),)}
    with decoding(folder, "check the folder"):
        for place, names, files in os.walk(folder, onerror=_raise, followlinks=True):
            chain = chains.pop(place)
            names[:] = [name for name in names if _leads_on(os.path.join(place, name), chain)]
            for name in names:
                path = os.path.join(place, name)
                chains[path] = (*chain, os.path.realpath(path))
            yield place, files


def _raise(error: OSError) -> None:
    raise error


def _leads_on(path: str, chain: tuple[str, ...]) -> bool:
    """Return whether a folder is not hidden, and no link to a folder above it."""
    name = os.path.basename(path)
    if name.startswith(".") or name == UNPACKER_FOLDER:
        return False
    real = os.path.realpath(path)
    return not any(
        f"{above}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}") for above in chain
    )
