"""One update of a stage: task loss, feature loss, and micro-batches that keep the whole batch.

A contrastive loss needs all features of a batch at once. With micro-batches the features are computed
without gradient first, the loss gives the gradient of every feature, and a second forward pass of
each micro-batch carries that on to the weights: the same gradient as without micro-batches.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from com_pt.adapters.sharding import whole
from com_pt.chain import ChainConfig, StageConfig
from com_pt.losses import InverseFeatureLoss
from com_pt.tasks.base import Task
from effml_common.finite import check_finite
from effml_common.state import rng_state, set_rng_state

NO_DECAY = (
    "positional_embedding", "pos_embed", "cls_token", "class_embedding", "reg_token", "cls_emb",
    "relative_position_bias_table", "logit_scale", "logit_bias",
)  # fmt: skip
PROJECTED = "projected "


class StageModel(nn.Module):
    """The model in training and the projectors beside it, so that both are synchronised.

    Args:
        task: What ``features`` means.
        model: The successor.
        feature_loss: Its projectors; None in the first stage.
    """

    def __init__(
        self, task: Task, model: nn.Module, feature_loss: InverseFeatureLoss | None
    ) -> None:
        super().__init__()
        self.task = task
        self.model = model
        self.feature_loss = feature_loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The task's outputs, and each stream in the predecessor's width."""
        outputs = self.task.features(self.model, batch)
        if self.feature_loss is None:
            return outputs
        projected = {
            PROJECTED + stream: self.feature_loss.project(stream, outputs[stream])
            for stream in self.task.streams
        }
        return {**outputs, **projected}


def train_step(
    stage: StageModel,
    wrapped: nn.Module,
    predecessor: StageModel | None,
    batch: Any,
    optimizer: Any,
    accelerator: Any,
    *,
    micro_batches: int = 1,
    step: int = 1,
    last_good: Path | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update from a batch that is on the device already; nothing is logged.

    Args:
        stage: The unwrapped module.
        wrapped: The same, as accelerate wrapped it.
        predecessor: The frozen smaller model; None without one.
        batch: Tensors in tuples, lists or dicts.
        optimizer: Of the module's parameters.
        accelerator: An ``accelerate.Accelerator``.
        micro_batches: Equal parts that the batch is computed in.
        step: Number of the update, for messages.
        last_good: Checkpoint folder, for messages.

    Returns:
        The loss and its named terms, detached, on the device.

    Raises:
        NonFiniteError: If a loss or gradient is NaN or infinite; the weights are unchanged then.
    """
    # The predecessor's streams are the targets of the feature loss.
    parts = split(batch, micro_batches)
    targets = [predecessor_streams(predecessor, part, accelerator) for part in parts]

    optimizer.zero_grad()
    total, terms = accumulate(stage, wrapped, parts, targets, accelerator)

    # With fp16 the scaler looks at the gradients itself.
    for name, value in terms.items():
        check_finite(value, step=step, term=name, last_good=last_good)
    if accelerator.scaler is None:
        norm = nn.utils.get_total_norm([p.grad for p in stage.parameters() if p.grad is not None])
        check_finite(total, whole(norm), step=step, term="total", last_good=last_good)

    optimizer.step()
    stage.task.after_step(stage.model)
    return total, terms


def predecessor_streams(
    predecessor: StageModel | None, part: Any, accelerator: Any
) -> dict[str, Tensor]:
    """The predecessor's streams on the same batch; unit length is the loss's business."""
    if predecessor is None:
        return {}
    with torch.no_grad(), accelerator.autocast():
        outputs = predecessor(part)
    return {name: outputs[name] for name in predecessor.task.streams}


def losses_of(
    stage: StageModel, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum and named terms of all losses."""
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
    """Gradients of one update from its micro-batches; returns the loss and its terms.

    Args:
        stage: The unwrapped module.
        wrapped: The same, as accelerate wrapped it.
        parts: Micro-batches of equal size, on the device.
        targets: The predecessor's streams for each; empty without one.
        accelerator: An ``accelerate.Accelerator``.
    """
    if len(parts) == 1:
        with accelerator.autocast():
            outputs = wrapped(parts[0])
        loss, terms = losses_of(stage, outputs, targets[0])
        accelerator.backward(loss)
        return loss.detach(), {name: value.detach() for name, value in terms.items()}
    if not stage.task.couples_samples:
        return _plain(stage, wrapped, parts, targets, accelerator)
    before, cached = [], []
    for part in parts:
        before.append(rng_state())
        with torch.no_grad(), accelerator.autocast():
            cached.append(stage(part))
    leaves = {
        name: [out[name].detach().float().requires_grad_() for out in cached]
        if cached[0][name].is_floating_point()
        else [out[name] for out in cached]
        for name in cached[0]
    }
    joined = {name: _join(values) for name, values in leaves.items()}
    together = {name: torch.cat([t[name] for t in targets]) for name in targets[0]}
    loss, terms = losses_of(stage, joined, together)
    loss.backward()
    for i, part in enumerate(parts):
        set_rng_state(before[i])
        with _maybe_no_sync(accelerator, wrapped, last=i == len(parts) - 1):
            with accelerator.autocast():
                outputs = wrapped(part)
            carried = [
                (outputs[name].float() * values[i].grad).sum()
                for name, values in leaves.items()
                if values[i].grad is not None
            ]
            accelerator.backward(torch.stack(carried).sum())
    return loss.detach(), {name: value.detach() for name, value in terms.items()}


def _plain(
    stage: StageModel,
    wrapped: nn.Module,
    parts: Sequence[Any],
    targets: Sequence[Mapping[str, Tensor]],
    accelerator: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        with _maybe_no_sync(accelerator, wrapped, last=i == len(parts) - 1):
            with accelerator.autocast():
                outputs = wrapped(part)
            loss, terms = losses_of(stage, outputs, targets[i])
            accelerator.backward(loss / len(parts))
        share = loss.detach() / len(parts)
        total = share if total is None else total + share
        for name, value in terms.items():
            share = value.detach() / len(parts)
            sums[name] = sums[name] + share if name in sums else share
    assert total is not None
    return total, sums


def _maybe_no_sync(accelerator: Any, wrapped: nn.Module, *, last: bool) -> Any:
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def _join(values: Sequence[Tensor]) -> Tensor:
    """Micro-batches one after the other; of scalars, which they share, the mean."""
    return torch.cat(list(values)) if values[0].dim() else torch.stack(list(values)).mean()


def split(batch: Any, parts: int) -> list[Any]:
    """Equal parts of every tensor in a batch."""
    from torch.utils import _pytree

    leaves, shape = _pytree.tree_flatten(batch)
    pieces = [leaf.chunk(parts) for leaf in leaves]
    return [_pytree.tree_unflatten([p[i] for p in pieces], shape) for i in range(parts)]


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch on a device."""
    from torch.utils import _pytree

    return _pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)


def make_optimizer(module: nn.Module, chain: ChainConfig, stage: StageConfig) -> torch.optim.AdamW:
    """A stage's own AdamW."""
    return torch.optim.AdamW(
        parameter_groups(module, stage.weight_decay),
        lr=stage.lr,
        betas=chain.betas,
        eps=chain.eps,
    )


def parameter_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay for vectors, scales, tokens and positions."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() >= 2 and name.rpartition(".")[2] not in NO_DECAY
            groups[plain].append(parameter)
    chosen = ((groups[True], decay), (groups[False], 0.0))
    return [{"params": params, "weight_decay": wd} for params, wd in chosen if params]


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Of update ``step`` (from 0): linear warm-up, at most a tenth of the stage, then a cosine."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = min(floor, peak)
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
