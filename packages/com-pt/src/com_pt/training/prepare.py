"""Everything that a stage needs to be trained, on its device and wrapped for its processes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from com_pt.adapters.sharding import shard
from com_pt.config import ChainConfig, StageConfig
from com_pt.method.cost import steps_of
from com_pt.method.losses import InverseFeatureLoss
from com_pt.training.data.loading import Batches, seed_of
from com_pt.training.data.tensors import to_device
from com_pt.training.optimizer import make_optimizer
from com_pt.training.stage import StageModel
from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError
from effml_common.logging import say


@dataclass(frozen=True)
class PreparedStage:
    """A stage that is ready to be trained.

    Attributes:
        batches: Batches of this process.
        steps: Updates of the stage.
        module: The successor and its projectors, unwrapped.
        wrapped: The same, as accelerate wrapped it.
        predecessor: The frozen smaller model; None without a feature loss.
        optimizer: Of the module's parameters, as accelerate wrapped it.
        unsharded: A model to gather shards into; None where nothing is sharded.
    """

    batches: Batches
    steps: int
    module: StageModel
    wrapped: nn.Module
    predecessor: StageModel | None
    optimizer: Any
    unsharded: nn.Module | None


def prepare_stage(
    task: Task,
    chain: ChainConfig,
    stage: StageConfig,
    model: nn.Module,
    predecessor: nn.Module | None,
    epochs: float,
    accelerator: Any,
) -> PreparedStage:
    """Prepare a stage.

    Args:
        task: The paradigm.
        chain: Settings that all stages share.
        stage: Settings of this one.
        model: The successor, grown already; trained in place.
        predecessor: The finished smaller model, which is frozen; None for the first stage.
        epochs: Passes over the data.
        accelerator: An ``accelerate.Accelerator``.

    Raises:
        ConfigError: If feature widths differ and no projector is allowed.
        InputError: If there are too few data, or a batch does not split.
    """
    # Batches of this process, and how many of them.
    world = accelerator.num_processes
    seed = seed_of(chain.seed, stage.name)
    batches = Batches(task, stage.batch_size, seed, accelerator.process_index, world, chain.workers)
    if stage.batch_size % (world * chain.accum_freq):
        raise ConfigError(
            f"a batch of {stage.batch_size} does not split into {world} processes times "
            f"{chain.accum_freq} micro-batches; change batch_size or accum_freq"
        )
    steps = steps_of(epochs, len(task), stage.batch_size)

    # The predecessor is frozen, and its features are the targets of the feature loss.
    if chain.grad_checkpointing:
        use_checkpointing(model)
    loss, frozen = None, None
    if predecessor is not None and stage.feature_weight > 0:
        predecessor = predecessor.to(accelerator.device).eval().requires_grad_(False)
        examples = task.collate([batches.readable[0, i][0] for i in range(2)])
        loss = _make_feature_loss(task, chain, stage, model, predecessor, examples, accelerator)
        frozen = StageModel(task, predecessor, None)
    module = StageModel(task, model.train(), loss).to(accelerator.device)

    # Shards are spread before the optimizer knows the parameters.
    sharded = chain.shard and world > 1
    unsharded = copy.deepcopy(model).cpu() if sharded else None
    for part in (module, frozen) if sharded else ():
        if part is not None:
            shard(part, accelerator.device)
    optimizer = make_optimizer(module, chain, stage)
    wrapped: nn.Module = module
    if sharded:
        optimizer = accelerator.prepare(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(module, optimizer)
    return PreparedStage(batches, steps, module, wrapped, frozen, optimizer, unsharded)


def _make_feature_loss(
    task: Task,
    chain: ChainConfig,
    stage: StageConfig,
    model: nn.Module,
    predecessor: nn.Module,
    examples: Any,
    accelerator: Any,
) -> InverseFeatureLoss:
    """Make the feature loss for the widths that both models' features have."""
    # One forward pass of each tells the widths.
    examples = to_device(examples, accelerator.device)
    widths = []
    for network in (model.to(accelerator.device).eval(), predecessor):
        with torch.no_grad():
            outputs = task.features(network, examples)
        widths.append({name: outputs[name].shape[-1] for name in task.streams})

    # A projector is drawn from a seed of its own.
    torch.manual_seed(seed_of(chain.seed, stage.name, "projector"))
    loss = InverseFeatureLoss(
        {name: (widths[0][name], widths[1][name]) for name in task.streams},
        stage.feature_weight,
        cap=chain.cap,
        projector=chain.projector,
    )
    for name, layer in loss.projectors.items():
        say(f"projector for {name}: {tuple(layer.weight.shape)}")  # pyright: ignore
    return loss


def use_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, by the host library's own switch.

    Raises:
        ConfigError: If the model has none.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    else:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing; set grad_checkpointing: false"
        )
