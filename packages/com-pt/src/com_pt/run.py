"""Runs a chain: grows each member from its predecessor, trains it, saves it, keeps the accounts."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from com_pt.adapters.grow import grow, layout_of, scale_eps
from com_pt.chain import ChainConfig, StageConfig, check_order
from com_pt.cost import ChainCost, StageCost
from com_pt.data.loading import seed_of
from com_pt.tasks.base import Task, task_class
from com_pt.trainer import StageTrainer, make_accelerator
from effml_common import checkpoint
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import say, warn
from effml_common.parsing import one_line

STATE, LEDGER, FROZEN = "chain_state.json", "ledger.jsonl", "chain.json"


@dataclass(frozen=True)
class Member:
    """A finished member.

    Attributes:
        macs: Of its training, predecessor included.
        metrics: Of ``Task.evaluate`` at the end.
        start: The same right after growth.
    """

    name: str
    steps: int
    samples: int
    macs: float
    seconds: float
    metrics: Mapping[str, float]
    start: Mapping[str, float]


def plan_chain(chain: ChainConfig, task: Task | None = None) -> ChainCost:
    """What a chain costs, from its models' shapes alone."""
    task = task_class(chain.task)(chain.data) if task is None else task  # its len may be costly
    macs = [task.macs(stage.model) for stage in chain.stages]
    stages = [
        StageCost(
            stage.name,
            macs[i],
            macs[i - 1] if i > 0 and stage.feature_weight > 0 else 0,
            0 if stage.init_from else chain.epochs_of(i),
        )
        for i, stage in enumerate(chain.stages)
    ]
    return ChainCost(stages, chain.individual_epochs)


def run_chain(
    chain: ChainConfig,
    out: str | Path,
    *,
    task: Task | None = None,
    resume: bool = False,
    force: bool = False,
    device: torch.device | None = None,
) -> list[Member]:
    """Train every member in turn.

    Args:
        chain: The chain.
        out: A finished member's folder per stage, as the host library loads it, and ``run``.
        task: Default the one that the chain names, with its data.
        resume: Go on where an interrupted run stopped, inside a stage or between two.
        force: Resume although settings have changed.
        device: Where to compute; None leaves the choice to accelerate.

    Returns:
        The members, from small to large.

    Raises:
        InputError: If the chain, its data or the out folder cannot be used.
        NonFiniteError: If a loss or gradient becomes NaN or infinite.
    """
    out = Path(out)
    task = task_class(chain.task)(chain.data) if task is None else task
    trained = chain.stages[-1:] if chain.resize_pos else chain.stages
    task.adopt({stage.name: stage.model for stage in trained})
    if len(task) == 0:
        raise InputError("there are no training data; give some under data: train")
    cost = plan_chain(chain, task)
    sizes = [_size(task, stage) for stage in chain.stages]
    check_order([stage.name for stage in chain.stages], sizes)
    accelerator = make_accelerator(chain.precision, device)
    _check_run(chain, out, resume=resume, force=force)
    # A slower process must not find what the first one writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _open_run(chain, out)
    accelerator.wait_for_everyone()
    say(
        f"{len(task)} training samples; batches of "
        f"{', '.join(str(stage.batch_size) for stage in chain.stages)} over "
        f"{accelerator.num_processes} processes"
    )
    members = _finished(out) if resume else []
    for i, stage in enumerate(chain.stages):
        if i < len(members):
            continue
        folder = out / "run" / f"stage-{i + 1}-{stage.name}"
        predecessor = chain.stages[i - 1] if i > 0 else None
        # A member that is done may have been the last thing before the interruption.
        member = _stage(
            chain, i, task, cost.stages[i], out, folder, predecessor, accelerator, resume
        )
        members.append(member)
        if accelerator.is_main_process:
            _write_state(chain, out, members)
        accelerator.wait_for_everyone()
    return members


def _stage(
    chain: ChainConfig,
    index: int,
    task: Task,
    cost: StageCost,
    out: Path,
    folder: Path,
    before: StageConfig | None,
    accelerator: Any,
    resume: bool,
) -> Member:
    stage = chain.stages[index]
    if stage.init_from is not None:
        model = _load(task, Path(stage.init_from), stage)
        metrics = task.evaluate(model.to(accelerator.device).eval())
        _publish(task, model, stage, out, accelerator)
        return Member(stage.name, 0, 0, 0.0, 0.0, metrics, metrics)
    torch.manual_seed(seed_of(chain.seed, stage.name, "init"))
    model = task.build(stage.model)
    predecessor = None if before is None else _load(task, out / before.name, before)
    start: dict[str, float] = {}
    if predecessor is not None:
        start = _grow(chain, stage, task, model, predecessor, folder, accelerator, resume)
    trainer = StageTrainer(
        task, chain, stage, model, predecessor, chain.epochs_of(index), accelerator
    )
    result = trainer.run(folder, resume=resume)
    metrics = task.evaluate(result.model)
    _warn_if_weak(chain, task, stage, index, metrics)
    _publish(task, result.model, stage, out, accelerator)
    macs = float(result.samples) * cost.per_sample
    return Member(stage.name, result.steps, result.samples, macs, result.seconds, metrics, start)


def _grow(
    chain: ChainConfig,
    stage: StageConfig,
    task: Task,
    model: nn.Module,
    predecessor: nn.Module,
    folder: Path,
    accelerator: Any,
    resume: bool,
) -> dict[str, float]:
    """Grow, once: a resumed stage takes its weights from the checkpoint and only keeps the eps."""
    record = folder / "growth.json"
    if resume and record.exists() and checkpoint.latest(folder / "checkpoints") is not None:
        done = json.loads(record.read_text(encoding="utf-8"))
        scale_eps(model, layout_of(model), done["eps_factor"])
        return done["metrics"]
    # On the device, except for models that are sharded because they do not fit there.
    if not chain.shard:
        predecessor.to(accelerator.device)
        model.to(accelerator.device)
    report = grow(
        predecessor,
        model,
        stage.growth,
        stage.depth,
        seed=seed_of(chain.seed, stage.name, "split") % 2**31,
        resize_pos=chain.resize_pos,
    )
    start = task.evaluate(model.to(accelerator.device).eval())
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(record, json.dumps({**report.to_json(), "metrics": start}, indent=1))
    headline = f", {task.headline} {start[task.headline]:.4g}" if task.headline in start else ""
    say(f"{stage.name}: {report.inherited:.0%} of its weights are inherited{headline}")
    return start


def _load(task: Task, folder: Path, stage: StageConfig) -> nn.Module:
    try:
        return task.load(folder, stage.model)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{folder} cannot be loaded as {stage.name}: {one_line(str(error))}; check the folder"
        ) from error


def _publish(task: Task, model: nn.Module, stage: StageConfig, out: Path, accelerator: Any) -> None:
    """Write a member under another name first, so that its folder is whole or absent."""
    if not accelerator.is_main_process:
        return
    staging, target = out / f".tmp-{stage.name}-{os.getpid()}", out / stage.name
    shutil.rmtree(staging, ignore_errors=True)
    task.save(model, stage.model, staging)
    if target.exists():  # left by a kill between this and the note of it
        shutil.rmtree(target)
    os.rename(staging, target)


def _check_run(chain: ChainConfig, out: Path, *, resume: bool, force: bool) -> None:
    frozen = out / "run" / FROZEN
    if frozen.exists():
        if not resume:
            raise ConfigError(f"{out} holds a run already; choose another --out, or --resume auto")
        old = json.loads(frozen.read_text(encoding="utf-8"))
        if old["digest"] != chain.digest() and not force:
            raise ConfigError(
                f"the settings differ from those of {out}; resume with the same, or add --force"
            )


def _open_run(chain: ChainConfig, out: Path) -> None:
    for dead in out.glob(".tmp-*"):
        shutil.rmtree(dead, ignore_errors=True)
    frozen = out / "run" / FROZEN
    frozen.parent.mkdir(parents=True, exist_ok=True)
    document = {"digest": chain.digest(), **asdict(chain)}
    atomic_write(frozen, json.dumps(document, indent=1, default=str) + "\n")


def _write_state(chain: ChainConfig, out: Path, members: list[Member]) -> None:
    hashes = {member.name: _hash(out / member.name) for member in members}
    state = {"digest": chain.digest(), "sha256": hashes, "members": [asdict(m) for m in members]}
    atomic_write(out / "run" / STATE, json.dumps(state, indent=1) + "\n")
    lines = [json.dumps(asdict(member)) for member in members]
    atomic_write(out / "run" / LEDGER, "\n".join(lines) + "\n")


def _finished(out: Path) -> list[Member]:
    """Members that an earlier run completed, as far as their files are what was written."""
    path = out / "run" / STATE
    if not path.exists():
        return []
    state = json.loads(path.read_text(encoding="utf-8"))
    done = []
    for entry in state["members"]:
        if _hash(out / entry["name"]) != state["sha256"][entry["name"]]:
            raise InputError(
                f"{out / entry['name']} is not what was written; remove it and {path} to train it again"
            )
        done.append(Member(**entry))
    return done


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _size(task: Task, stage: StageConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in task.build(stage.model).parameters())


def _warn_if_weak(
    chain: ChainConfig, task: Task, stage: StageConfig, index: int, metrics: Mapping[str, float]
) -> None:
    chance, value = task.chance(), metrics.get(task.headline)
    last = index == len(chain.stages) - 1
    if chance is None or value is None or last or chain.allow_weak:
        return
    if value <= 1.5 * chance:
        warn(
            f"{stage.name} is at chance ({value:.3g}, chance {chance:.3g}); saturate it "
            "before the chain goes on (more epochs), or set allow_weak: true"
        )
