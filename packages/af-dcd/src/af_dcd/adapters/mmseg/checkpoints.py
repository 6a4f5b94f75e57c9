"""Checkpoints that users hand over. They are read as data: no code in them runs."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from effml_common.errors import CheckpointError, InputError
from effml_common.parsing import one_line


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read ``state_dict`` and ``meta`` of an mmengine checkpoint or a plain state dict.

    Raises:
        CheckpointError: If it is missing, damaged, or holds anything but tensors and plain data.
    """
    # Whatever the bytes make the reader do, they are no checkpoint.
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}; give the .pth file")
    try:
        with torch.serialization.safe_globals(_types_of_histories()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = one_line(str(error)).partition("Please file")[0]
        raise CheckpointError(
            f"{path} is refused: {why[:300]}; give a checkpoint of tensors and plain data"
        ) from error

    # Weights are what counts; a plain state dict is nothing else.
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; give a state dict")
    weights = content.get("state_dict", content)
    weights = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no weights; give a segmenter's checkpoint")
    return {"state_dict": weights, "meta": content.get("meta") or {}}


def _types_of_histories() -> list[Any]:
    """List what mmengine's own checkpoints hold beside tensors: the history of logged numbers."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    types = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")]
    return [
        HistoryBuffer, core.scalar, core._reconstruct, np.ndarray, np.dtype, *types,
        (_history_statistic, "builtins.getattr"),
    ]  # fmt: skip


def _history_statistic(owner: Any, name: str) -> Any:
    # HistoryBuffer pickles its four statistics as getattr(HistoryBuffer, name); nothing else may ask.
    if owner is HistoryBuffer and name in ("mean", "max", "min", "current"):
        return builtins.getattr(owner, name)
    raise InputError(f"a checkpoint may not ask for {name}; it is refused")


def load_weights(model: torch.nn.Module, path: str, *, strict: bool = True) -> dict[str, Any]:
    """Load a checkpoint into a segmenter; returns its ``meta``.

    Raises:
        CheckpointError: If weights are missing or of another shape; ``strict`` refuses surplus ones too,
            all but those of the distillation branch.
    """
    # Names as the model has them; DDP puts "module." in front.
    checkpoint = read_checkpoint(path)
    weights = {k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()}
    own = model.state_dict()

    # The branch is no part of the student, so it may be there or not.
    misshapen = [k for k, v in weights.items() if k in own and v.shape != own[k].shape]
    missing = [k for k in own if k not in weights and not k.startswith("afdcd.")]
    surplus = [k for k in weights if k not in own and not k.startswith("afdcd.")]
    problems = {"misses": missing, "has other shapes for": misshapen}
    problems |= {"adds": surplus} if strict else {}
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{path} does not fit its config: it {problem} {len(names)} weights, "
                f"such as {names[0]}; give the checkpoint that was trained with this config"
            )
    model.load_state_dict(weights, strict=False)
    return checkpoint["meta"]
