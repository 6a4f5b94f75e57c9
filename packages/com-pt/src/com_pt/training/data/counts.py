"""Settings of the data: counts, and the kinds of values that the others may have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from com_pt.training.data.huggingface import is_hugging_face
from effml_common.errors import ConfigError


def read_count(data: Mapping[str, Any], name: str, default: int) -> int:
    """Return a count among the settings of the data.

    Raises:
        ConfigError: If it is no whole number of 1 or more.
    """
    value = data.get(name, default)
    if not _is_count(value):
        raise ConfigError(f"data: {name} is {value!r}; give a whole number of 1 or more")
    return value


def check_settings(data: Mapping[str, Any]) -> None:
    """Refuse values of the built-in tasks' data settings that are of a wrong kind or out of range.

    A text such as "false" would else count as true, and a wrong kind fail far from its cause.

    Raises:
        ConfigError: Naming the first wrong setting.
    """
    for names, is_right, remedy in KINDS:
        for name in names:
            if name in data and not is_right(data[name]):
                raise ConfigError(f"data: {name} is {data[name]!r}; {remedy}")
    unknown = sorted({*map(str, data.get("zero_shot", {}))} - ZERO_SHOT_SETTINGS)
    if unknown:
        raise ConfigError(
            f"zero_shot has no setting {unknown[0]}; give images, classes and templates"
        )
    check_use(data)


def check_use(data: Mapping[str, Any]) -> None:
    """Refuse settings of a kind of source that no part of the data has: they would do nothing.

    Raises:
        ConfigError: Naming the first such setting.
    """
    parts = (data.get("train"), data.get("val"), data.get("zero_shot", {}).get("images"))
    kinds = {kind for source in parts if source for kind in _kinds_of(source)}
    for name, (kind, what) in KIND_OF_SETTING.items():
        if kinds and data.get(name) is not None and kind not in kinds:
            raise ConfigError(
                f"data: {name} is {data[name]}, but none of the data are {what}; leave it out"
            )


def _kinds_of(source: str | Path | Sequence[str]) -> Iterator[str]:
    """Yield the kinds of what a source names; patterns may stand for tables or tars."""
    if is_hugging_face(source):
        yield "data set"
        return
    for name in [source] if isinstance(source, str | Path) else source:
        is_known = Path(name).is_dir() or str(name).lower().endswith(".tar")
        yield "folder or tar" if is_known else "table"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_source(value: Any) -> bool:
    return value is None or _is_path(value) or (_is_list(value) and all(map(_is_path, value)))


def _is_size(value: Any) -> bool:
    return _is_count(value) or (_is_list(value) and len(value) == 2 and all(map(_is_count, value)))


def _is_area(value: Any) -> bool:
    is_pair = _is_list(value) and len(value) == 2 and all(map(_is_number, value))
    return is_pair and 0 < value[0] <= value[1]


def _is_smoothing(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_classes(value: Any) -> bool:
    return value is None or _is_count(value) or _is_path(value) or (_is_list(value) and bool(value))


ZERO_SHOT_SETTINGS = {"images", "classes", "templates"}

# Settings that belong to one kind of source alone.
KIND_OF_SETTING = {
    "images": ("table", "tables of paths"),
    "image_key": ("data set", "data sets with columns (hf:)"),
    "label_key": ("data set", "data sets with columns (hf:)"),
}

# Names of settings, what their values are, and what to do about others.
KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("train", "val"), _is_source, "give a path or a list of paths"),
    (("images",), lambda value: value is None or _is_path(value), "give a folder"),
    (("image_size",), _is_size, "give the pixels of a side, or of height and width"),
    (("context_length", "val_batch", "val_blocks"), _is_count, "give a whole number of 1 or more"),
    (("crop_scale",), _is_area, "give two shares of the area, such as [0.9, 1.0]"),
    (("smoothing",), _is_smoothing, "give a number from 0 to 1"),
    (("classes",), _is_classes, "give their number, a list of names or a file of them"),
    (("stream",), lambda value: value is None or isinstance(value, bool), "give true or false"),
    (
        ("sentences", "local_loss", "gather_with_grad"),
        lambda value: isinstance(value, bool),
        "give true or false",
    ),
    (
        ("tokenizer",),
        lambda value: bool(value) and _is_source(value),
        "name a tokenizer or its folder, or list words where the task takes them",
    ),
    (
        ("zero_shot",),
        lambda value: isinstance(value, Mapping),
        "give images, classes and templates",
    ),
)
