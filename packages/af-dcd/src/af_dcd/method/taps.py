"""Where features are read: the tap grammar.

feat:<i>         entry i of the list of feature maps (mmsegmentation); feat:-1 is the last stage
pre_cls          what enters the classifier of the last head (mmsegmentation)
module:<path>    output of a module of any model, by its dotted path
module:<path>:<i>  entry i (a number or a key) of an output that is a tuple or a mapping
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from effml_common.errors import InputError


@dataclass(frozen=True)
class Tap:
    """A parsed tap: ``kind`` is feat, pre_cls or module."""

    kind: str
    path: str = ""
    entry: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Tap":
        """Read a tap.

        Raises:
            InputError: If it is none.
        """
        if text == "pre_cls":
            return cls("pre_cls")
        if found := re.fullmatch(r"feat:(-?\d+)", text):
            return cls("feat", entry=found[1])
        if found := re.fullmatch(r"module:([\w.]+)(?::(-?\w+))?", text):
            return cls("module", found[1], found[2])
        raise InputError(
            f"{text!r} is no tap; write feat:-1, feat:<i>, pre_cls, module:<path> or "
            "module:<path>:<entry>"
        )


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        InputError: If there is none; the nearest paths are named.
    """
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path]
    near = get_close_matches(path, list(modules), n=3, cutoff=0.4)
    near = near or [name for name, _ in model.named_children()]
    raise InputError(f"the model has no module {path!r}; try {', '.join(near)}")


def as_map(value: Any, tap: Tap, what: str = "") -> Tensor:
    """The [b, c, h, w] map in what a tapped module returned.

    Raises:
        InputError: If it is a collection and no entry was named, or no such map.
    """
    where = what or f"module:{tap.path}"
    if tap.entry is not None and not isinstance(value, Tensor):
        try:
            value = value[tap.entry] if isinstance(value, Mapping) and not _number(tap.entry) else (
                list(value.values()) if isinstance(value, Mapping) else value
            )[int(tap.entry)]  # fmt: skip
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InputError(
                f"{where} has no entry {tap.entry}; it has {_entries(value)}"
            ) from error
    if isinstance(value, Mapping | list | tuple):
        raise InputError(f"{where} returns several things; append :<entry>, of {_entries(value)}")
    if not isinstance(value, Tensor) or value.dim() != 4:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{where} gives {shape}; tap a module whose output is [b, c, h, w]")
    return value


def _number(entry: str) -> bool:
    return entry.lstrip("-").isdecimal()


def _entries(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    return f"0 to {len(value) - 1}" if hasattr(value, "__len__") else type(value).__name__


@contextmanager
def recording(model: nn.Module, tap: Tap) -> Iterator[list[Any]]:
    """Collect what the tapped module returns inside the block; the model is untouched afterwards."""
    seen: list[Any] = []
    if tap.kind != "module":
        yield seen
        return
    module = find_module(model, tap.path)
    handle = module.register_forward_hook(lambda _m, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
