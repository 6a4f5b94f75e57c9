"""Configs that users hand over: found and read. ``config_builder`` changes them."""

from pathlib import Path
from typing import Any

from mmengine.config import Config

from af_dcd.adapters.mmseg.shims import quiet
from effml_common.errors import InputError
from effml_common.parsing import one_line

CONFIGS = Path(__file__).parents[2] / "configs"


def read_config(name: str) -> Config:
    """Read a config: a file, ``mmseg::<file>`` of the installed mmseg, or ``af-dcd::<file>`` of ours.

    The suffix ``.py`` may be left out.

    Raises:
        InputError: If there is none, or it cannot be parsed, or it is of mmseg 0.x.
    """
    # A config is a program: anything may be wrong in it.
    try:
        config = _load(name)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"config {name} cannot be read: {one_line(str(error))}; see mmseg's"
        ) from error

    # It must describe a segmenter, in mmseg's present form.
    if "data" in config and "train_dataloader" not in config:
        raise InputError(f"config {name} is of mmseg 0.x; convert it to 1.x, or take mmseg's own")
    if "model" not in config:
        raise InputError(f"config {name} has no model; give a config of a whole segmenter")
    return config


def _load(name: str) -> Config:
    if name.startswith("mmseg::"):
        from mmengine.hub import get_config

        with quiet():
            return get_config(name)

    # Ours lie beside this package's code.
    path = CONFIGS / name.removeprefix("af-dcd::") if name.startswith("af-dcd::") else Path(name)
    path = path if path.suffix else path.with_suffix(".py")
    if not path.is_file():
        raise InputError(f"there is no config {name}; give a file, mmseg::<file> or af-dcd::<file>")
    return Config.fromfile(path)


def dataset_metainfo(path: Path) -> dict[str, Any]:
    """Read classes and palette of the data set that a config trains on, without its files."""
    from mmseg.registry import DATASETS

    # Wrappers such as RepeatDataset hold the data set itself.
    config = Config.fromfile(path)
    dataset = config.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset

    # What the config says wins over what the class says.
    dataset_class: Any = DATASETS.get(str(dataset.type))
    metainfo = dict(getattr(dataset_class, "METAINFO", {}) or {})
    return {**metainfo, **dict(dataset.get("metainfo") or {})}
