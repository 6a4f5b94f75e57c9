"""What a run needs to continue bit for bit: model, optimizer, scheduler and every random state."""

import random
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from effml_common.checkpoint import Checkpoint
from effml_common.errors import CheckpointError
from effml_common.logging import warn
from effml_common.parsing import one_line


def rng_state() -> dict[str, Any]:
    """States of the python, numpy (if imported), torch and CUDA generators, as plain data.

    CUDA's belong to it only if this process has used CUDA: a run on the CPU must not wake the cards,
    and a forked loading process, which may not touch them, has the host's generators alone.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss]}
    state["torch"] = torch.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back where ``rng_state`` found them; warns if the cards are others."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import_module("numpy").random.set_state(tuple(state["numpy"]))

    # Cards have their generators only in a process that uses them.
    saved = state.get("cuda", [])
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    if len(saved) != devices:
        change = f"saved with {len(saved)} CUDA devices, now {devices}"
        warn(f"{change}: the run will not repeat exactly")
    for device, one in zip(range(devices), saved, strict=False):
        torch.cuda.set_rng_state(one, device)


def training_state(
    model: nn.Module, optimizer: Any, scheduler: Any = None, **extra: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a training run, the two arguments of ``checkpoint.save``.

    ``extra`` is what else the loop needs: the loader's position, states of other generators.
    """
    schedule = None if scheduler is None else scheduler.state_dict()
    state = {"optimizer": optimizer.state_dict(), "scheduler": schedule, "rng": rng_state()}
    return model.state_dict(), {**state, "extra": extra}


def restore_training_state(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Any, scheduler: Any = None
) -> dict[str, Any]:
    """Put everything back in place that ``training_state`` took; returns its ``extra``.

    Raises:
        CheckpointError: If the checkpoint belongs to another model, optimizer or kind of run.
    """
    try:
        model.load_state_dict(checkpoint.tensors)
        optimizer.load_state_dict(checkpoint.state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(checkpoint.state["scheduler"])
        set_rng_state(checkpoint.state["rng"])
        return checkpoint.state["extra"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{checkpoint.path} does not fit this run: {one_line(error)}"
        remedy = "resume with the settings it was made with, or choose another --out"
        raise CheckpointError(f"{why}; {remedy}") from error
