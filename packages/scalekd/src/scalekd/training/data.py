"""Images through timm's own data sets, checked, and with crops that can be repeated for a cache."""

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset

from effml_common.errors import ConfigError, InputError
from effml_common.logging import warn
from effml_common.parsing import one_line
from scalekd.config import DataConfig, TrainConfig
from scalekd.training.plan import TrainingPlan
from scalekd.training.processes import Processes

# Names of a split that timm takes for one another.
SPLIT_SPELLINGS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
DATASET_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")


@dataclass(frozen=True)
class TrainingImages:
    """The images to train on.

    Attributes:
        dataset: Labelled images; without a length where they come as a stream.
        batch_size: Images in a batch of this process.
    """

    dataset: Any
    batch_size: int


def read_training_images(
    plan: TrainingPlan, processes: Processes, views: int | None
) -> TrainingImages:
    """Open the training split.

    Args:
        plan: Names the data set and the batch.
        processes: Share a batch between them.
        views: Number of repeatable augmentations of each image that a cache holds; None has no end
            of them.

    Raises:
        InputError: If the images are not there, too few, or not what the student is built for.
    """
    config, recipe = plan.config, plan.recipe
    batch_size = split_batch(plan, processes)
    check_splits(config)

    # A stream has no image numbers, hence neither checks by image nor a cache.
    source = open_dataset(
        config, config.train_split, training=True, seed=config.seed, batch_size=batch_size
    )
    if not hasattr(source, "__getitem__") or isinstance(source, torch.utils.data.IterableDataset):
        if views is not None:
            raise ConfigError("a cache needs images with an index; use a folder or hfds/")
        return TrainingImages(source, batch_size)

    dataset = CheckedImages(source, config.num_classes, config.skip_bad, views, config.seed)
    if len(dataset) < recipe.batch_size:
        raise ConfigError(
            f"{len(dataset)} images are fewer than one batch of {recipe.batch_size}; lower "
            "--batch-size or add images"
        )
    return TrainingImages(dataset, batch_size)


def open_indexed_images(config: TrainConfig, views: int) -> "CheckedImages":
    """Open the training split for a cache: crops repeat, and a bad image stops the run.

    Raises:
        InputError: If the images are not there, or come as a stream, without an index.
    """
    source = open_dataset(config, config.train_split, training=True)
    if isinstance(source, torch.utils.data.IterableDataset):
        raise ConfigError("a cache needs images with an index; use a folder or hfds/")
    return CheckedImages(source, config.num_classes, False, views, config.seed)


def split_batch(plan: TrainingPlan, processes: Processes) -> int:
    """Return the number of images in a batch of one process, between two accumulations.

    Raises:
        ConfigError: If the images of an update cannot be split evenly.
    """
    total, parts = plan.recipe.batch_size, processes.world * plan.config.grad_accum
    if total % parts:
        raise ConfigError(
            f"a batch of {total} cannot be split over {processes.world} processes "
            f"and {plan.config.grad_accum} accumulated batches; use a multiple of their product"
        )
    return total // parts


def open_dataset(
    config: DataConfig, split: str, *, training: bool, seed: int = 0, batch_size: int = 1
) -> Any:
    """Open a data set through timm.

    Args:
        config: Names it.
        split: Which part of it.
        training: Whether a stream is shuffled and repeated.
        seed: Of the order of a stream.
        batch_size: Images per batch, to which a stream is padded.

    Raises:
        InputError: If the folder, the split or an optional library is missing, or a class is empty.
    """
    name = config.dataset
    if name and not name.lower().startswith(DATASET_PREFIXES):
        prefixes = ", ".join(DATASET_PREFIXES)
        raise InputError(f"dataset {name} is not known; start it with {prefixes}")
    if not name:
        _check_folder(Path(config.data_dir), split)

    # timm and the libraries behind it fail in many ways.
    try:
        return create_dataset(
            name,
            root=config.data_dir or None,
            split=split,
            is_training=training,
            batch_size=batch_size,
            seed=seed,
        )
    except ModuleNotFoundError as error:
        extra = {"hf": "datasets", "wd": "webdataset"}.get(name[:2].lower(), "")
        advice = f"pip install scalekd[{extra}]" if extra else f"install {error.name}"
        raise InputError(f"{name} needs {error.name}; {advice}") from error
    except (RuntimeError, AssertionError, ValueError, OSError, KeyError) as error:
        place = name or config.data_dir
        raise InputError(
            f"no images for split {split} in {place}: {one_line(str(error))}; check --data-dir, "
            "--dataset and the split names"
        ) from error


def check_splits(config: TrainConfig) -> None:
    """Check that both splits of a folder have the same classes, not more than the student's head.

    timm numbers the classes of each split by itself: a class that one lacks would shift the labels.

    Raises:
        InputError: If a split or a class is missing, or there are too many classes.
    """
    if config.dataset:
        return
    root = Path(config.data_dir)
    for split in (config.train_split, config.val_split):
        _check_folder(root, split)

    # A class that stands in one split only is named, with the split that has it.
    train, val = (
        {path.name for path in _class_folders(_split_folder(root, split))}
        for split in (config.train_split, config.val_split)
    )
    if train != val:
        unmatched = min(train ^ val)
        splits = (config.train_split, config.val_split)
        present, absent = splits if unmatched in train else splits[::-1]
        raise InputError(
            f"class {unmatched} of {root} is in {present} but not in {absent}; both need the same "
            "class folders"
        )

    if len(train) > config.num_classes:
        raise InputError(
            f"{root} has {len(train)} class folders, but there are {config.num_classes} classes; "
            "set --num-classes"
        )


def _check_folder(root: Path, split: str) -> None:
    if not root.is_dir():
        raise InputError(f"{root} is no folder; give one with {split} and class folders in it")
    folder = _split_folder(root, split)
    for path in _class_folders(folder):
        if not any(child.is_file() or child.is_dir() for child in path.iterdir()):
            raise InputError(f"class folder {path} is empty; add images or remove it")


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _split_folder(root: Path, split: str) -> Path:
    # timm would read the folder above instead of one that is missing.
    names = (split, *next((names for names in SPLIT_SPELLINGS if split in names), ()))
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise InputError(f"{root} has no folder {split}; add it, or name another split")
    return folder


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
        self.skipped = 0

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
        # The image itself, or with skip_bad the next one that can be read.
        image, label, index = self._read_good(index)
        if not 0 <= int(label) < self.num_classes:
            raise InputError(
                f"image {self._name(index)} has label {label}, but there are {self.num_classes} "
                "classes; set --num-classes"
            )

        if self.views is None:
            return self.transform(image), label
        with repeatable(self.seed, self.view, index):
            return self.transform(image), label, index

    def _read_good(self, index: int) -> tuple[Any, Any, int]:
        """Image, label and index of the first image from ``index`` on that can be read."""
        for offset in range(len(self) if self.skip_bad else 1):
            candidate = (index + offset) % len(self)
            try:
                return *self._read(candidate), candidate
            except (OSError, ValueError, SyntaxError) as error:
                name = self._name(candidate)
                if not self.skip_bad:
                    why = one_line(str(error))
                    raise InputError(
                        f"image {name} cannot be read ({why}); replace it, or --skip-bad"
                    ) from error
                self.skipped += 1
                warn(f"skipped {name}, {self.skipped} so far in this process")
        raise InputError("no image of the data set can be read; check the files")

    def _read(self, index: int) -> tuple[Any, Any]:
        """Read image and label, without the transform.

        Not ``dataset[index]``: that takes the next image in place of one that it cannot read.
        """
        reader = getattr(self.dataset, "reader", None)
        if reader is None:  # torchvision's own
            transform, self.dataset.transform = self.dataset.transform, None
            try:
                return self.dataset[index]
            finally:
                self.dataset.transform = transform
        file, label, *_ = reader[index]
        with closing(file):
            return Image.open(file).convert("RGB"), label

    def _name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index))
        except (AttributeError, NotImplementedError, TypeError):
            return f"number {index}"


@contextmanager
def repeatable(*key: int) -> Iterator[None]:
    """Make random numbers inside depend on ``key`` alone; outside nothing changes.

    It covers what draws in main memory, as augmentation does. The generators of cards are left alone:
    a forked loading process may not touch them.
    """
    outside = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = hash(key) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's augmentations draw from it)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(outside[0])
        np.random.set_state(outside[1])  # noqa: NPY002
        torch.set_rng_state(outside[2])
