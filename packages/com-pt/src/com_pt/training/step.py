"""One update of a stage: task loss, feature loss, and micro-batches that keep the whole batch.

A contrastive loss needs all features of a batch at once. With micro-batches the features are computed
without gradient first, the loss gives the gradient of every feature, and a second forward pass of
each micro-batch carries that on to the weights: the same gradient as without micro-batches.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from com_pt.adapters.sharding import own_shards
from com_pt.training.optimizer import is_fused, unwrapped
from com_pt.training.overflow import OverflowCounter
from com_pt.training.stage_model import PROJECTED, StageModel
from effml_common.checkpoint import rng_state, set_rng_state
from effml_common.stopping import StepMonitor

TERM, TOTAL = "loss term ", "total"  # names of what the monitor gets


def train_step(
    stage: StageModel,
    wrapped: nn.Module,
    predecessor: StageModel | None,
    batch: Any,
    optimizer: Any,
    accelerator: Any,
    *,
    monitor: StepMonitor,
    overflows: OverflowCounter | None = None,
    micro_batches: int = 1,
    step: int = 1,
) -> None:
    """Make one update from a batch that is on the device already; nothing is logged.

    A fused optimizer leaves the update out on the device where a value is not finite, and the host is
    not waited for: the monitor tells when it is read. With any other optimizer it is read here.

    Args:
        stage: The unwrapped module.
        wrapped: The same, as accelerate wrapped it.
        predecessor: The frozen smaller model; None without one.
        batch: Tensors in tuples, lists or dicts.
        optimizer: The optimizer of the module's parameters.
        accelerator: An ``accelerate.Accelerator``.
        monitor: Gets the loss (``total``), its terms and the norm of the gradient.
        overflows: Counts what the scaler of fp16 skips; None without a scaler.
        micro_batches: Equal parts that the batch is computed in.
        step: The number of the update.

    Raises:
        NonFiniteError: If a loss or gradient is NaN or infinite; the weights are unchanged then.
    """
    # The predecessor's streams are the targets of the feature loss.
    parts = split_batch(batch, micro_batches)
    targets = [predecessor_streams(predecessor, part, accelerator) for part in parts]

    # Gradients of the whole batch, part by part.
    optimizer.zero_grad()
    total, terms = accumulate(stage, wrapped, parts, targets, accelerator)

    # Every rank's values in one reduction; with fp16 the scaler looks at the gradients itself.
    gradients = own_shards([p.grad for p in stage.parameters() if p.grad is not None])
    norm = nn.utils.get_total_norm(gradients)
    values = {**{TERM + name: value for name, value in terms.items()}, TERM + TOTAL: total}
    is_bad = monitor.judge(step, values if overflows else {**values, "gradient norm": norm})

    # The update itself is left out where a value is bad.
    if overflows is not None:
        overflows.count(norm)
        torch._foreach_mul_(gradients, torch.where(is_bad > 0, torch.nan, 1.0))
    elif is_fused(optimizer):
        unwrapped(optimizer).found_inf = is_bad
    else:
        monitor.read()
    optimizer.step()

    # What the task does to the model after it.
    stage.task.after_step(stage.model)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split every tensor of a batch, in tuples, lists or dicts, into equal parts."""
    leaves, shape = _pytree.tree_flatten(batch)
    pieces = [leaf.chunk(parts) for leaf in leaves]
    return [_pytree.tree_unflatten([p[i] for p in pieces], shape) for i in range(parts)]


def predecessor_streams(
    predecessor: StageModel | None, part: Any, accelerator: Any
) -> dict[str, Tensor]:
    """Return the predecessor's streams on the same batch; unit length is the loss's business."""
    if predecessor is None:
        return {}
    with torch.no_grad(), accelerator.autocast():
        outputs = predecessor(part)
    return {name: outputs[name] for name in predecessor.task.streams}


def sum_losses(
    stage: StageModel, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum and the named terms of all losses.

    Args:
        stage: Says what the losses are.
        outputs: What its forward pass returned.
        targets: The predecessor's streams; empty without one.
    """
    terms = stage.task.loss(outputs)
    total = torch.stack([value.float() for value in terms.values()]).sum()
    if stage.feature_loss is not None and targets:
        projected = {name: outputs[PROJECTED + name] for name in targets}
        terms = {**terms, "feature": stage.feature_loss(projected, targets, total)}
        total = total + terms["feature"]
    return total, terms


def accumulate(
    stage: StageModel,
    wrapped: nn.Module,
    parts: Sequence[Any],
    targets: Sequence[Mapping[str, Tensor]],
    accelerator: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradients of one update from its micro-batches.

    Args:
        stage: The unwrapped module.
        wrapped: The same, as accelerate wrapped it.
        parts: Micro-batches of equal size, on the device.
        targets: The predecessor's streams for each; empty without one.
        accelerator: An ``accelerate.Accelerator``.

    Returns:
        The loss and its named terms, detached, on the device.
    """
    if len(parts) > 1 and stage.task.couples_samples:
        return _accumulate_coupled(stage, wrapped, parts, targets, accelerator)
    if len(parts) > 1:
        return _accumulate_independent(stage, wrapped, parts, targets, accelerator)
    with accelerator.autocast():
        outputs = wrapped(parts[0])
    loss, terms = sum_losses(stage, outputs, targets[0])
    accelerator.backward(loss)
    return loss.detach(), {name: value.detach() for name, value in terms.items()}


def _accumulate_coupled(
    stage: StageModel,
    wrapped: nn.Module,
    parts: Sequence[Any],
    targets: Sequence[Mapping[str, Tensor]],
    accelerator: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate where the loss compares samples of the whole batch."""
    # Features of every part without gradient, and the random state that each part began with.
    random_states, cached = [], []
    for part in parts:
        random_states.append(rng_state())
        with torch.no_grad(), accelerator.autocast():
            cached.append(stage(part))

    # The loss of the whole batch gives the gradient of every feature.
    leaves = {
        name: [out[name].detach().float().requires_grad_() for out in cached]
        if cached[0][name].is_floating_point()
        else [out[name] for out in cached]
        for name in cached[0]
    }
    outputs = {name: _join(values) for name, values in leaves.items()}
    joined_targets = {name: torch.cat([t[name] for t in targets]) for name in targets[0]}
    loss, terms = sum_losses(stage, outputs, joined_targets)
    loss.backward()

    # A second forward pass of each part, with the same dropout, carries them on to the weights.
    for i, part in enumerate(parts):
        set_rng_state(random_states[i])
        with _no_sync_but_last(accelerator, wrapped, i, len(parts)):
            with accelerator.autocast():
                outputs = wrapped(part)
            products = [
                (outputs[name].float() * values[i].grad).sum()
                for name, values in leaves.items()
                if values[i].grad is not None
            ]
            accelerator.backward(torch.stack(products).sum())
    return loss.detach(), {name: value.detach() for name, value in terms.items()}


def _accumulate_independent(
    stage: StageModel,
    wrapped: nn.Module,
    parts: Sequence[Any],
    targets: Sequence[Mapping[str, Tensor]],
    accelerator: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate where the loss of a batch is the mean over its samples."""
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        # Gradients of this part, as its share of the batch.
        with _no_sync_but_last(accelerator, wrapped, i, len(parts)):
            with accelerator.autocast():
                outputs = wrapped(part)
            loss, terms = sum_losses(stage, outputs, targets[i])
            accelerator.backward(loss / len(parts))

        # Means over the parts, kept on the device.
        share = loss.detach() / len(parts)
        total = share if total is None else total + share
        for name, value in terms.items():
            share = value.detach() / len(parts)
            sums[name] = sums[name] + share if name in sums else share
    assert total is not None
    return total, sums


def _no_sync_but_last(accelerator: Any, wrapped: nn.Module, index: int, count: int) -> Any:
    """Let processes exchange gradients in the last part only."""
    if index == count - 1:
        return contextlib.nullcontext()
    return accelerator.no_sync(wrapped)


def _join(values: Sequence[Tensor]) -> Tensor:
    """Join micro-batches one after the other; of scalars, which they share, take the mean."""
    return torch.cat(list(values)) if values[0].dim() else torch.stack(list(values)).mean()
