"""One member of a chain: grown from its predecessor, trained beside it, and judged."""

import json
from pathlib import Path

import torch
from torch import nn

from com_pt.adapters.checkpoint_file import read_weights
from com_pt.adapters.grow import grow
from com_pt.adapters.layouts import layout_of
from com_pt.adapters.model_folder import load_weights
from com_pt.adapters.norm_eps import scale_eps
from com_pt.method_config import StageConfig
from com_pt.training.data.loading import seed_of
from com_pt.training.plan import Run, StagePlan
from com_pt.training.prepare import prepare_stage
from com_pt.training.run_folder import Member
from com_pt.training.tasks.base import Task
from com_pt.training.trainer import StageResult, StageTrainer
from effml_common import checkpoint
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import rank, say, warn
from effml_common.parsing import one_line

WEAK = 1.5  # times chance: a predecessor below this has nothing to teach


def train_member(stage: StagePlan, run: Run) -> tuple[nn.Module, Member]:
    """Train a member, or take the finished model that the chain names.

    Args:
        stage: The member's plan.
        run: Its chain, task, out folder (with the predecessor in it) and processes.

    Returns:
        The finished model, and the record of its training.
    """
    # A model that was trained elsewhere is only judged.
    settings, chain, task = stage.settings, run.chain, run.task
    if settings.init_from is not None:
        model = _load_model(task, Path(settings.init_from), settings)
        metrics = task.evaluate(model.to(run.accelerator.device).eval())
        return model, Member(settings.name, 0, 0, 0.0, 0.0, metrics, metrics)

    # Train it; what only training needs is freed before the model is judged.
    result, start = _grow_and_train(stage, run)
    run.accelerator.free_memory()
    stop_together(run)

    # Judge it: the next member is grown from it.
    metrics = task.evaluate(result.model) if result.metrics is None else result.metrics
    chance, value = task.chance(), metrics.get(task.headline)
    may_warn = not (stage.is_last or chain.allow_weak)
    if may_warn and chance is not None and value is not None and value <= WEAK * chance:
        warn(
            f"{settings.name} is at chance ({value:.3g}, chance {chance:.3g}); saturate it "
            "before the chain goes on (more epochs), or set allow_weak: true"
        )
    stop_together(run)
    macs = float(result.samples) * stage.cost.per_sample
    return result.model, Member(
        settings.name, result.steps, result.samples, macs, result.seconds, metrics, start
    )


def _grow_and_train(stage: StagePlan, run: Run) -> tuple[StageResult, dict[str, float]]:
    """Return the trained model, and the metrics that it had right after growth."""
    # Grow a fresh model from its finished predecessor.
    settings, chain, task = stage.settings, run.chain, run.task
    torch.manual_seed(seed_of(chain.seed, settings.name, "init"))
    model = task.build(settings.model)
    folder = run.out / "run" / f"stage-{stage.number}-{settings.name}"
    saved = checkpoint.latest(folder / "checkpoints") if run.resume else None
    predecessor, start = None, {}
    if stage.predecessor is not None:
        predecessor = _load_model(task, run.out / stage.predecessor.name, stage.predecessor)
        start = _grow_once(run, settings, model, predecessor, folder, is_resumed=saved is not None)
        stop_together(run)

    # Train it beside the predecessor.
    prepared = prepare_stage(
        task, chain, settings, model, predecessor, stage.cost.epochs, run.accelerator
    )
    trainer = StageTrainer(prepared, task, run.sink)
    if saved is not None:
        trainer.restore(saved)
        del saved  # it is as large as the model and its moments
    return trainer.run(folder, run.stop), start


def stop_together(run: Run) -> None:
    """Obey a signal that came outside of training, where every process passes the same places.

    Raises:
        Interrupted: If one has come to any process; what is finished is saved already.
    """
    run.stop.agree()
    run.stop.check()


def _load_model(task: Task, folder: Path, settings: StageConfig) -> nn.Module:
    if not folder.exists():
        raise InputError(
            f"{folder} is not there for process {rank()}; give a path that every machine of the run sees"
        )

    # A checkpoint file has weights alone; the stage says of which model.
    if folder.is_file():
        return load_weights(task.build(settings.model), read_weights(folder), folder)
    try:
        return task.load(folder, settings.model)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{folder} cannot be loaded as {settings.name}: {one_line(str(error))}; check the folder"
        ) from error


def _grow_once(
    run: Run,
    settings: StageConfig,
    model: nn.Module,
    predecessor: nn.Module,
    folder: Path,
    *,
    is_resumed: bool,
) -> dict[str, float]:
    """Grow a model in place, and return its metrics right after."""
    # A resumed stage takes its weights from the checkpoint and only needs the eps.
    record = folder / "growth.json"
    if is_resumed and record.exists():
        growth = json.loads(record.read_text(encoding="utf-8"))
        scale_eps(model, layout_of(model), growth["eps_factor"])
        return growth["metrics"]

    # Grow on the device, except for models that are sharded because they do not fit there.
    device = run.accelerator.device
    if not run.chain.shard:
        predecessor.to(device)
        model.to(device)
    report = grow(
        predecessor,
        model,
        settings.growth,
        settings.depth,
        seed=seed_of(run.chain.seed, settings.name, "split") % 2**31,
        resize_pos=run.chain.resize_pos,
    )

    # Record what was inherited and what it is worth.
    metrics = run.task.evaluate(model.to(device).eval())
    if run.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(record, json.dumps({**report.to_json(), "metrics": metrics}, indent=1))
    name = run.task.headline
    headline = f", {name} {metrics[name]:.4g}" if name in metrics else ""
    say(f"{settings.name}: {report.inherited:.0%} of its weights are inherited{headline}")
    return metrics
