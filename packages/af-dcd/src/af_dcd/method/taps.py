"""Where features are read: the tap grammar, and what is read there.

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
    """A parsed tap: ``kind`` is feat, pre_cls or module.

    >>> Tap.parse("module:backbone:high")
    Tap(kind='module', path='backbone', entry='high')
    """

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
        if match := re.fullmatch(r"feat:(-?\d+)", text):
            return cls("feat", entry=match[1])
        if match := re.fullmatch(r"module:([\w.]+)(?::(-?\w+))?", text):
            return cls("module", match[1], match[2])
        raise InputError(
            f"{text!r} is no tap; write feat:-1, feat:<i>, pre_cls, module:<path> or "
            "module:<path>:<entry>"
        )


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Find the submodule at a dotted path.

    Raises:
        InputError: If there is none; the nearest paths are named.
    """
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path]
    near = get_close_matches(path, list(modules), n=3, cutoff=0.4)
    near = near or [name for name, _ in model.named_children()]
    raise InputError(f"the model has no module {path!r}; try {', '.join(near)}")


@contextmanager
def record_outputs(model: nn.Module, tap: Tap) -> Iterator[list[Any]]:
    """Collect what the tapped module returns inside the block; the model is untouched afterwards."""
    outputs: list[Any] = []
    if tap.kind != "module":
        yield outputs
        return

    # A hook sees every call of the module, however deep in the model it is made.
    module = find_module(model, tap.path)
    handle = module.register_forward_hook(lambda _m, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def feature_map(output: Any, tap: Tap, place: str = "") -> Tensor:
    """Take the [b, c, h, w] map out of what a tapped module returned.

    Args:
        output: A tensor, or a tuple, list or mapping of them.
        tap: Names the entry of a collection.
        place: What the output belongs to, for messages; default the tapped module.

    Raises:
        InputError: If it is a collection and no entry was named, or no such map.
    """
    # The entry that the tap names.
    place = place or f"module:{tap.path}"
    if tap.entry is not None and not isinstance(output, Tensor):
        output = _entry(output, tap.entry, place)

    # Exactly one map must be left.
    if isinstance(output, Mapping | list | tuple):
        raise InputError(
            f"{place} returns several things; append :<entry>, of {_entry_names(output)}"
        )
    if not isinstance(output, Tensor) or output.dim() != 4:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"{place} gives {shape}; tap a module whose output is [b, c, h, w]")
    return output


def _entry(collection: Any, entry: str, place: str) -> Any:
    try:
        if isinstance(collection, Mapping):
            by_number = entry.lstrip("-").isdecimal()
            return list(collection.values())[int(entry)] if by_number else collection[entry]
        return collection[int(entry)]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            f"{place} has no entry {entry}; it has {_entry_names(collection)}"
        ) from error


def _entry_names(collection: Any) -> str:
    if isinstance(collection, Mapping):
        return ", ".join(map(str, collection))
    if hasattr(collection, "__len__"):
        return f"0 to {len(collection) - 1}"
    return type(collection).__name__
