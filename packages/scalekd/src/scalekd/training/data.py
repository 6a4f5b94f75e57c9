"""Images through timm's own data sets and loaders, with crops that can be repeated for a cache."""

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from effml_common.errors import InputError
from effml_common.logging import warn
from effml_common.parsing import one_line
from effml_common.state import host_rng_state, set_host_rng_state
from scalekd.adapters.pairing import normalisation
from scalekd.config import DataConfig, TrainConfig
from scalekd.training.recipe import Recipe

# timm takes these for one another.
SPELLINGS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")


def dataset_of(
    config: DataConfig, split: str, *, training: bool, seed: int = 0, batch: int = 1
) -> Any:
    """A timm data set.

    Raises:
        InputError: If the folder, the split or an optional library is missing, or a class is empty.
    """
    name = config.dataset
    if name and not name.lower().startswith(PREFIXES):
        raise InputError(f"dataset {name} is not known; start it with {', '.join(PREFIXES)}")
    if not name:
        _check_folder(Path(config.data_dir), split)
    try:
        return create_dataset(
            name,
            root=config.data_dir or None,
            split=split,
            is_training=training,
            batch_size=batch,
            seed=seed,
        )
    except ModuleNotFoundError as error:
        extra = {"hf": "datasets", "wd": "webdataset"}.get(name[:2].lower(), "")
        advice = f"pip install scalekd[{extra}]" if extra else f"install {error.name}"
        raise InputError(f"{name} needs {error.name}; {advice}") from error
    except (RuntimeError, AssertionError, ValueError, OSError, KeyError) as error:
        where = name or config.data_dir
        raise InputError(
            f"no images for split {split} in {where}: {one_line(str(error))}; check --data-dir, "
            "--dataset and the split names"
        ) from error


def _check_folder(root: Path, split: str) -> None:
    if not root.is_dir():
        raise InputError(f"{root} is no folder; give one with {split} and class folders in it")
    folder = _split_folder(root, split)
    for path in _classes(folder):
        if not any(child.is_file() or child.is_dir() for child in path.iterdir()):
            raise InputError(f"class folder {path} is empty; add images or remove it")


def check_splits(config: TrainConfig) -> None:
    """Both splits of a folder of images are there, with the same classes, not more than the head has.

    timm numbers the classes of each split by itself: a class that one lacks would shift the labels.

    Raises:
        InputError: If not.
    """
    if config.dataset:
        return
    root = Path(config.data_dir)
    for split in (config.train_split, config.val_split):
        _check_folder(root, split)
    train, val = (
        {path.name for path in _classes(_split_folder(root, split))}
        for split in (config.train_split, config.val_split)
    )
    if train != val:
        odd = min(train ^ val)
        here, there = config.train_split, config.val_split
        here, there = (here, there) if odd in train else (there, here)
        raise InputError(
            f"class {odd} of {root} is in {here} but not in {there}; both need the same class folders"
        )
    if len(train) > config.num_classes:
        raise InputError(
            f"{root} has {len(train)} class folders, but there are {config.num_classes} classes; "
            "set --num-classes"
        )


def _classes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _split_folder(root: Path, split: str) -> Path:
    # timm would read the folder above instead of one that is missing.
    names = (split, *next((names for names in SPELLINGS if split in names), ()))
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise InputError(f"{root} has no folder {split}; add it, or name another split")
    return found


class CheckedImages(torch.utils.data.Dataset[Any]):
    """A map-style data set whose errors name the image, and whose crops can be repeated.

    Args:
        dataset: timm's; its ``transform`` is set by the loader.
        num_classes: Labels must be below.
        skip_bad: Replace unreadable images by the next good one, instead of stopping.
        views: None, or how many repeatable augmentations there are; an item is then
            (image, label, index) and the augmentation depends on (seed, view, index) alone.
        seed: For them.
    """

    def __init__(
        self,
        dataset: Any,
        num_classes: int,
        skip_bad: bool,
        views: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.num_classes, self.skip_bad = dataset, num_classes, skip_bad
        self.views, self.seed, self.view = views, seed, 0
        self.bad = 0

    @property
    def transform(self) -> Any:
        """The data set's transform, which timm's loader sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for offset in range(len(self) if self.skip_bad else 1):
            at = (index + offset) % len(self)
            try:
                image, label = self._read(at)
            except (OSError, ValueError, SyntaxError) as error:
                if not self.skip_bad:
                    raise InputError(
                        f"image {self._name(at)} cannot be read ({one_line(str(error))}); replace "
                        "it, or --skip-bad"
                    ) from error
                self.bad += 1
                warn(f"skipped {self._name(at)}, {self.bad} so far in this process")
                continue
            if not 0 <= int(label) < self.num_classes:
                raise InputError(
                    f"image {self._name(at)} has label {label}, but there are {self.num_classes} "
                    "classes; set --num-classes"
                )
            if self.views is None:
                return self.transform(image), label
            with repeatable(self.seed, self.view, at):
                return self.transform(image), label, at
        raise InputError("no image of the data set can be read; check the files")

    def _read(self, index: int) -> tuple[Any, Any]:
        """Image and label, without the transform.

        Not ``dataset[index]``: that takes the next image in place of one that it cannot read.
        """
        reader = getattr(self.dataset, "reader", None)
        if reader is None:  # torchvision's own
            keep, self.dataset.transform = self.dataset.transform, None
            try:
                return self.dataset[index]
            finally:
                self.dataset.transform = keep
        opened, label, *_ = reader[index]
        with closing(opened):
            return Image.open(opened).convert("RGB"), label

    def _name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index))
        except (AttributeError, NotImplementedError, TypeError):
            return f"number {index}"


@contextmanager
def repeatable(*key: int) -> Iterator[None]:
    """Random numbers inside depend on ``key`` alone; outside nothing changes.

    It covers what draws in main memory, as augmentation does. The generators of cards are left alone:
    a forked loading process may not touch them.
    """
    before = host_rng_state()
    seed = hash(key) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from it)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_host_rng_state(before)


def training_loader(
    dataset: Any,
    config: TrainConfig,
    recipe: Recipe,
    student: nn.Module,
    batch: int,
    device: torch.device,
    distributed: bool,
) -> Any:
    """The loader of timm with the recipe's augmentation, normalised for the student."""
    mean, std = normalisation(student)
    return create_loader(
        dataset,
        input_size=(3, config.img_size, config.img_size),
        batch_size=batch,
        is_training=True,
        scale=(config.min_crop, 1.0),
        re_prob=recipe.erase,
        re_mode="pixel",
        color_jitter=config.color_jitter,
        auto_augment=recipe.auto_augment or None,
        interpolation=recipe.interpolation,
        mean=mean,
        std=std,
        num_workers=config.workers,
        distributed=distributed,
        device=device,
        # On the CPU everything happens in the transform: then a resumed run can repeat its draws.
        use_prefetcher=device.type == "cuda" and config.cache is None and _pairs(dataset),
        persistent_workers=False,
        pin_memory=device.type == "cuda",
    )


def _pairs(dataset: Any) -> bool:
    return getattr(dataset, "views", None) is None


def evaluation_loader(
    dataset: Any, size: int, student: nn.Module, batch: int, workers: int, device: torch.device
) -> Any:
    """Resize, centre crop 224 of 256, bicubic; normalised for the student."""
    mean, std = normalisation(student)
    return create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=batch,
        interpolation="bicubic",
        crop_pct=0.875,
        mean=mean,
        std=std,
        num_workers=workers,
        device=device,
        use_prefetcher=False,
        persistent_workers=False,
    )


def on_device(batch: Any, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor, Any]:
    """Images, labels and, from a repeatable data set, indices."""
    x, y, *rest = batch
    x = x.to(device, non_blocking=True)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, y.to(device, non_blocking=True), rest[0] if rest else None
