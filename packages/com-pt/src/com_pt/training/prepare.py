"""Everything that a stage needs to be trained, on its device and wrapped for its processes."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from com_pt.adapters.sharding import shard
from com_pt.method.cost import steps_of
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.data.loading import Batches, seed_of
from com_pt.training.feature_loss import make_feature_loss
from com_pt.training.frozen import freeze, hold_in_autocast_type, train_mode
from com_pt.training.optimizer import make_optimizer
from com_pt.training.stage_model import StageModel
from com_pt.training.tasks.base import Task
from effml_common.errors import ConfigError

COMPILER = "inductor"  # backend of torch.compile


@dataclass(frozen=True)
class PreparedStage:
    """A stage that is ready to be trained.

    Attributes:
        chain: Settings that all stages share.
        settings: Settings of this one.
        accelerator: An ``accelerate.Accelerator``.
        batches: The batches of this process.
        steps: How many updates the stage has.
        module: The successor and its projectors, unwrapped.
        wrapped: The same, as accelerate wrapped it.
        predecessor: The frozen smaller model; None without a feature loss.
        optimizer: The optimizer of the module's parameters, as accelerate wrapped it.
        unsharded: A model to gather shards into; None where nothing is sharded.
    """

    chain: ChainConfig
    settings: StageConfig
    accelerator: Any
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
    settings: StageConfig,
    model: nn.Module,
    predecessor: nn.Module | None,
    epochs: float,
    accelerator: Any,
) -> PreparedStage:
    """Prepare a stage.

    Args:
        task: The paradigm.
        chain: Settings that all stages share.
        settings: Settings of this one.
        model: The successor, grown already; trained in place.
        predecessor: The finished smaller model, which is frozen; None for the first stage.
        epochs: Passes over the data.
        accelerator: An ``accelerate.Accelerator``.

    Raises:
        ConfigError: If feature widths differ and no projector is allowed.
        InputError: If there are too few data, or a batch does not split.
    """
    # Batches of this process.
    world, size = accelerator.num_processes, settings.batch_size
    seed = seed_of(chain.seed, settings.name)
    batches = Batches(task, size, seed, accelerator.process_index, world, chain.workers)
    if size % (world * chain.accum_freq):
        raise ConfigError(
            f"a batch of {size} does not split into {world} processes times "
            f"{chain.accum_freq} micro-batches; change batch_size or accum_freq"
        )

    # The predecessor is frozen, and its features are the targets of the feature loss.
    if chain.grad_checkpointing:
        use_checkpointing(model)
    loss, frozen = None, None
    if predecessor is not None and settings.feature_weight > 0:
        predecessor = freeze(predecessor, accelerator.device)
        count = min(2, len(task))
        examples = task.collate([batches.readable[0, i][0] for i in range(count)])
        model.to(accelerator.device)
        loss = make_feature_loss(task, chain, settings, model, predecessor, examples)
        hold_in_autocast_type(predecessor, accelerator)
        frozen = StageModel(task, predecessor, None)
    module = StageModel(task, model, loss).to(accelerator.device)
    train_mode(module)

    # Shards are spread before the optimizer knows the parameters; else accelerate wraps both.
    unsharded = copy.deepcopy(model).cpu() if chain.shard and world > 1 else None
    if unsharded is not None:
        for part in (module, frozen):
            if part is not None:
                shard(part, accelerator.device)
    wrapped, optimizer = _wrap(module, frozen, chain, settings, accelerator, unsharded is not None)

    return PreparedStage(
        chain=chain,
        settings=settings,
        accelerator=accelerator,
        batches=batches,
        steps=steps_of(epochs, len(task), size),
        module=module,
        wrapped=wrapped,
        predecessor=frozen,
        optimizer=optimizer,
        unsharded=unsharded,
    )


def _wrap(
    module: StageModel,
    frozen: StageModel | None,
    chain: ChainConfig,
    settings: StageConfig,
    accelerator: Any,
    is_sharded: bool,
) -> tuple[nn.Module, Any]:
    """Return the module as its processes share it, and its optimizer."""
    if chain.compile:
        compile_forward(module)
        if frozen is not None:
            compile_forward(frozen)
    optimizer = make_optimizer(module, chain, settings)
    if is_sharded:
        return module, accelerator.prepare(optimizer)
    return accelerator.prepare(module, optimizer)


def compile_forward(module: nn.Module) -> None:
    """Compile a module's forward pass; the names of its parameters stay as they are.

    Random numbers are those of the uncompiled module, so that micro-batches repeat their dropout.
    """
    options = {"fallback_random": True} if COMPILER == "inductor" else None
    module.compile(backend=COMPILER, options=options)


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
