"""One member of a chain: grown from its predecessor, trained beside it, judged and saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from com_pt.adapters.grow import grow
from com_pt.adapters.layouts import layout_of
from com_pt.adapters.norm_eps import scale_eps
from com_pt.config import ChainConfig, StageConfig
from com_pt.training.data.loading import seed_of
from com_pt.training.plan import StagePlan
from com_pt.training.run_folder import Member, publish_member
from com_pt.training.tasks.base import Task
from com_pt.training.trainer import StageTrainer
from effml_common import checkpoint
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import say, warn
from effml_common.parsing import one_line


def train_member(
    stage: StagePlan,
    chain: ChainConfig,
    task: Task,
    out: Path,
    accelerator: Any,
    *,
    resume: bool,
) -> Member:
    """Train a member into its folder, or take the finished model that the chain names.

    Args:
        stage: The member's plan.
        chain: Settings that all stages share.
        task: Of the chain.
        out: Out folder of the run, with the predecessor in it.
        accelerator: An ``accelerate.Accelerator``.
        resume: Go on from the newest good checkpoint of the stage.
    """
    settings = stage.settings
    if settings.init_from is not None:
        return _take_finished(settings, task, out, accelerator)

    # A fresh model and its finished predecessor.
    torch.manual_seed(seed_of(chain.seed, settings.name, "init"))
    model = task.build(settings.model)
    before = stage.predecessor
    predecessor = None if before is None else _load_model(task, out / before.name, before)

    # Grow and train.
    folder = out / "run" / f"stage-{stage.number}-{settings.name}"
    start: dict[str, float] = {}
    if predecessor is not None:
        start = _grow_once(chain, settings, task, model, predecessor, folder, accelerator, resume)
    trainer = StageTrainer(task, chain, settings, model, predecessor, stage.epochs, accelerator)
    result = trainer.run(folder, resume=resume)

    # Judge and save.
    metrics = task.evaluate(result.model)
    if not stage.is_last and not chain.allow_weak:
        _warn_if_weak(task, settings, metrics)
    _publish(task, result.model, settings, out, accelerator)
    macs = float(result.samples) * stage.cost.per_sample
    return Member(settings.name, result.steps, result.samples, macs, result.seconds, metrics, start)


def _take_finished(settings: StageConfig, task: Task, out: Path, accelerator: Any) -> Member:
    """Judge and save a model that was trained elsewhere."""
    model = _load_model(task, Path(str(settings.init_from)), settings)
    metrics = task.evaluate(model.to(accelerator.device).eval())
    _publish(task, model, settings, out, accelerator)
    return Member(settings.name, 0, 0, 0.0, 0.0, metrics, metrics)


def _grow_once(
    chain: ChainConfig,
    settings: StageConfig,
    task: Task,
    model: nn.Module,
    predecessor: nn.Module,
    folder: Path,
    accelerator: Any,
    resume: bool,
) -> dict[str, float]:
    """Grow a model in place, and return its metrics right after."""
    # A resumed stage takes its weights from the checkpoint and only needs the eps.
    record = folder / "growth.json"
    if resume and record.exists() and checkpoint.latest(folder / "checkpoints") is not None:
        growth = json.loads(record.read_text(encoding="utf-8"))
        scale_eps(model, layout_of(model), growth["eps_factor"])
        return growth["metrics"]

    # Grow on the device, except for models that are sharded because they do not fit there.
    if not chain.shard:
        predecessor.to(accelerator.device)
        model.to(accelerator.device)
    report = grow(
        predecessor,
        model,
        settings.growth,
        settings.depth,
        seed=seed_of(chain.seed, settings.name, "split") % 2**31,
        resize_pos=chain.resize_pos,
    )

    # Record what was inherited and what it is worth.
    metrics = task.evaluate(model.to(accelerator.device).eval())
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(record, json.dumps({**report.to_json(), "metrics": metrics}, indent=1))
    headline = f", {task.headline} {metrics[task.headline]:.4g}" if task.headline in metrics else ""
    say(f"{settings.name}: {report.inherited:.0%} of its weights are inherited{headline}")
    return metrics


def _load_model(task: Task, folder: Path, settings: StageConfig) -> nn.Module:
    try:
        return task.load(folder, settings.model)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{folder} cannot be loaded as {settings.name}: {one_line(str(error))}; check the folder"
        ) from error


def _publish(
    task: Task, model: nn.Module, settings: StageConfig, out: Path, accelerator: Any
) -> None:
    if accelerator.is_main_process:
        publish_member(lambda folder: task.save(model, settings.model, folder), out, settings.name)


def _warn_if_weak(task: Task, settings: StageConfig, metrics: Mapping[str, float]) -> None:
    chance, value = task.chance(), metrics.get(task.headline)
    if chance is not None and value is not None and value <= 1.5 * chance:
        warn(
            f"{settings.name} is at chance ({value:.3g}, chance {chance:.3g}); saturate it "
            "before the chain goes on (more epochs), or set allow_weak: true"
        )
