"""Weights of a checkpoint file, as training scripts of open_clip, timm and the authors write them.

Nothing in the file is executed: beside tensors and plain data, only classes that hold data are allowed.
"""

import argparse
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from effml_common.errors import InputError
from effml_common.parsing import one_line

STATE_NAMES = ("state_dict", "model", "model_state_dict")  # of the weights among other things
DDP_PREFIX, COMPILED_PREFIX = "module.", "_orig_mod."
CONVERT = 'torch.save({"state_dict": checkpoint["state_dict"]}, "weights.pt")'


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the weights of a ``.pt``, ``.pth`` or ``.safetensors`` file by their names in the model.

    Raises:
        InputError: If the file cannot be read, holds another class, or no weights.
    """
    if file.suffix == ".safetensors":
        try:
            return _plain_names(load_file(file))
        except Exception as error:  # safetensors has errors of its own for damaged files
            raise _refusal(file, str(error), "download or export it again") from error
    content = _load(file)

    # Training scripts wrap the weights; a bare file has nothing else.
    if isinstance(content, Mapping):
        content = next((content[name] for name in STATE_NAMES if name in content), content)
    if isinstance(content, Mapping):
        weights = {str(name): value for name, value in content.items()}
        if weights and all(isinstance(value, Tensor) for value in weights.values()):
            return _plain_names(weights)
    raise _refusal(file, "it holds no weights by name", "give a file with a state_dict")


def _load(file: Path) -> Any:
    with torch.serialization.safe_globals(_harmless_classes()):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 (no checkpoint of ours)
        except Exception as error:  # damaged pickles raise whatever their bytes lead to
            refused = _refused_classes(file)
            if not refused:
                remedy = f"give a file of plain tensors, such as {CONVERT} writes"
                raise _refusal(file, str(error), remedy) from error
            why = f"it holds {', '.join(refused)}, which is no plain data"
            remedy = f"if you trust it, load it with weights_only=False and {CONVERT}"
            raise _refusal(file, why, remedy) from error


def _harmless_classes() -> list[Any]:
    """Return classes of plain data that training scripts save beside the weights."""
    import numpy as np

    # numpy's own makers of scalars and arrays, under the names of its versions 1 and 2.
    makers: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    named = [
        (maker, f"numpy.{core}.multiarray.{maker.__name__}")
        for maker in makers
        for core in ("core", "_core")
    ]
    dtypes = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "?")]
    return [argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray, *dtypes, *named]


def _refused_classes(file: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # no archive of torch at all, or a damaged one
        return []


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DDP and torch.compile put into the names."""
    names = {name: name.replace(COMPILED_PREFIX, "") for name in weights}
    while all(name.startswith(DDP_PREFIX) for name in names.values()):
        names = {old: name.removeprefix(DDP_PREFIX) for old, name in names.items()}
    return {names[name]: value for name, value in weights.items()}


def _refusal(file: Path, why: str, remedy: str) -> InputError:
    return InputError(f"{file} is refused: {one_line(why)[:300]}; {remedy}")
