"""Stop before an update with numbers that are not finite."""

import math
from pathlib import Path
from typing import Any

from effml_common.errors import NonFiniteError


def check_finite(
    loss: Any, grad_norm: Any = None, *, step: int, term: str, last_good: Path | None = None
) -> None:
    """Check a loss and the gradient norm (numbers or scalar tensors) before they are used.

    When torch.distributed is initialised every rank must call this at the same step; then all
    ranks raise together, whichever of them saw the bad number. The message names the ``term`` of
    the loss, the ``step`` that is about to be applied and the checkpoint to go back to.

    Raises:
        NonFiniteError: If either is NaN or infinite, on any rank.
    """
    named = {f"loss term {term}": loss, "gradient norm": grad_norm}
    values = {name: getattr(v, "item", lambda v=v: v)() for name, v in named.items()}
    bad = [f"{name} is {v}" for name, v in values.items() if v is not None and not math.isfinite(v)]
    if _some_rank(bool(bad)):
        what = " and ".join(bad) or f"loss term {term} or its gradient is bad on another rank"
        kept = f"last good checkpoint: {last_good}" if last_good else "no checkpoint yet"
        raise NonFiniteError(f"{what} at step {step} ({kept}); lower the learning rate")


def _some_rank(bad: bool) -> bool:
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return bad
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    fine = torch.tensor(int(not bad), device=device)
    distributed.all_reduce(fine, op=distributed.ReduceOp.MIN)
    return not fine.item()
