"""Configs and checkpoints that users hand over. Checkpoints are read as data: no code in them runs."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from af_dcd.adapters.mmseg.shims import quiet
from effml_common.errors import CheckpointError, InputError
from effml_common.parsing import one_line

CONFIGS = Path(__file__).parents[2] / "configs"


def read_config(name: str) -> Config:
    """A config by path, by ``mmseg::<file>`` of the installed mmseg, or by ``af-dcd::<file>`` of ours.

    Raises:
        InputError: If there is none, or it cannot be parsed, or it is of mmseg 0.x.
    """
    path = CONFIGS / name.removeprefix("af-dcd::") if name.startswith("af-dcd::") else Path(name)
    path = path if path.suffix else path.with_suffix(".py")
    try:
        if name.startswith("mmseg::"):
            from mmengine.hub import get_config

            with quiet():
                config = get_config(name)
        else:
            if not path.is_file():
                raise InputError(
                    f"there is no config {name}; give a file, mmseg::<file> or af-dcd::<file>"
                )
            config = Config.fromfile(path)
    except InputError:
        raise
    except Exception as error:  # a config is a program: anything may be wrong in it
        raise InputError(
            f"config {name} cannot be read: {one_line(str(error))}; see mmseg's"
        ) from error
    if "data" in config and "train_dataloader" not in config:
        raise InputError(f"config {name} is of mmseg 0.x; convert it to 1.x, or take mmseg's own")
    if "model" not in config:
        raise InputError(f"config {name} has no model; give a config of a whole segmenter")
    return config


def read_checkpoint(path: str) -> dict[str, Any]:
    """``state_dict`` and ``meta`` of an mmengine checkpoint or a plain state dict.

    Raises:
        CheckpointError: If it is missing, damaged, or holds anything but tensors and plain data.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}; give the .pth file")
    try:
        with torch.serialization.safe_globals(_logged_numbers()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the reader do, they are no checkpoint
        why = one_line(str(error)).partition("Please file")[0]
        raise CheckpointError(
            f"{path} is refused: {why[:300]}; give a checkpoint of tensors and plain data"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; give a state dict")
    weights = found.get("state_dict", found)
    weights = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no weights; give a segmenter's checkpoint")
    return {"state_dict": weights, "meta": found.get("meta") or {}}


def load_weights(model: torch.nn.Module, path: str, *, strict: bool = True) -> dict[str, Any]:
    """Load a checkpoint into a segmenter; returns its ``meta``.

    Raises:
        CheckpointError: If weights are missing or of another shape; ``strict`` refuses surplus ones too,
            all but those of the distillation branch.
    """
    found = read_checkpoint(path)
    weights = {k.removeprefix("module."): v for k, v in found["state_dict"].items()}
    own = model.state_dict()
    wrong = [k for k, v in weights.items() if k in own and v.shape != own[k].shape]
    missing = [k for k in own if k not in weights and not k.startswith("afdcd.")]
    surplus = [k for k in weights if k not in own and not k.startswith("afdcd.")]
    for kind, names in (("misses", missing), ("has other shapes for", wrong), ("adds", surplus)):
        if names and (strict or kind != "adds"):
            raise CheckpointError(
                f"{path} does not fit its config: it {kind} {len(names)} weights, such as {names[0]}; "
                "give the checkpoint that was trained with this config"
            )
    model.load_state_dict(weights, strict=False)
    return found["meta"]


def _logged_numbers() -> list[Any]:
    """What mmengine's own checkpoints hold beside tensors: the history of logged numbers."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    types = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")]
    return [
        HistoryBuffer, core.scalar, core._reconstruct, np.ndarray, np.dtype, *types,
        (_statistic, "builtins.getattr"),
    ]  # fmt: skip


def _statistic(owner: Any, name: str) -> Any:
    # HistoryBuffer pickles its four statistics as getattr(HistoryBuffer, name); nothing else may ask.
    if owner is HistoryBuffer and name in ("mean", "max", "min", "current"):
        return builtins.getattr(owner, name)
    raise InputError(f"a checkpoint may not ask for {name}; it is refused")
