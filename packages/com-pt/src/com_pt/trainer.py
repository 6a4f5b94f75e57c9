"""Trains a stage on accelerate: the loop, its checkpoints, the predecessor beside it."""

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from com_pt.adapters.sharding import fill, in_shards, shard, whole
from com_pt.chain import ChainConfig, StageConfig
from com_pt.cost import steps_of
from com_pt.data.loading import Batches, seed_of
from com_pt.losses import InverseFeatureLoss
from com_pt.stage import (
    StageModel,
    learning_rate,
    make_optimizer,
    to_device,
    train_step,
)
from com_pt.tasks.base import Task
from effml_common import checkpoint
from effml_common.errors import ConfigError, NonFiniteError
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, say, warn
from effml_common.state import restore_training_state, training_state

SKIPS = 3  # updates in a row that fp16's scaler may leave out
AMP = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class StageResult:
    """A finished stage: its model, what it saw, and how long it took (all runs together)."""

    model: nn.Module
    steps: int
    samples: int
    seconds: float
    skipped: int


class StageTrainer:
    """One stage: AdamW, warm-up and cosine of its own, the feature loss, resuming.

    Args:
        task: The paradigm.
        chain: Settings that all stages share.
        stage: Settings of this one.
        model: The successor, grown already; trained in place.
        predecessor: The finished smaller model, frozen; None for the first stage.
        epochs: Passes over the data.
        accelerator: An ``accelerate.Accelerator``; default one for this device.

    Raises:
        ConfigError: If feature widths differ and no projector is allowed.
        InputError: If there are too few data, or a batch does not split.
    """

    def __init__(
        self,
        task: Task,
        chain: ChainConfig,
        stage: StageConfig,
        model: nn.Module,
        predecessor: nn.Module | None,
        epochs: float,
        accelerator: Any = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator(chain.precision)
        self.task, self.chain, self.stage = task, chain, stage
        world = self.accelerator.num_processes
        self.batches = Batches(
            task,
            stage.batch_size,
            seed_of(chain.seed, stage.name),
            self.accelerator.process_index,
            world,
            chain.workers,
        )
        if stage.batch_size % (world * chain.accum_freq):
            raise ConfigError(
                f"a batch of {stage.batch_size} does not split into {world} processes times "
                f"{chain.accum_freq} micro-batches; change batch_size or accum_freq"
            )
        self.steps = steps_of(epochs, len(task), stage.batch_size)
        if chain.grad_checkpointing:
            use_checkpointing(model)
        device = self.accelerator.device
        self.predecessor = None
        loss = None
        if predecessor is not None and stage.feature_weight > 0:
            predecessor = predecessor.to(device).eval().requires_grad_(False)
            loss = self._feature_loss(model, predecessor)
            self.predecessor = StageModel(task, predecessor, None)
        self.module = StageModel(task, model.train(), loss).to(device)
        self.sharded = chain.shard and world > 1
        if self.sharded:
            self.plain = copy.deepcopy(model).cpu()
            for module in (self.module, self.predecessor):
                if module is not None:
                    shard(module, device)
        optimizer = make_optimizer(self.module, chain, stage)
        if self.sharded:
            self.wrapped, self.optimizer = self.module, self.accelerator.prepare(optimizer)
        else:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.seconds, self.skipped, self._in_a_row = 0.0, 0, 0
        self._capped = False

    def _feature_loss(self, model: nn.Module, predecessor: nn.Module) -> InverseFeatureLoss:
        batch = self.task.collate([self.batches.readable[0, i][0] for i in range(2)])
        widths = []
        batch = to_device(batch, self.accelerator.device)
        for one in (model.to(self.accelerator.device).eval(), predecessor):
            with torch.no_grad():
                outputs = self.task.features(one, batch)
            widths.append({name: outputs[name].shape[-1] for name in self.task.streams})
        dims = {name: (widths[0][name], widths[1][name]) for name in self.task.streams}
        torch.manual_seed(seed_of(self.chain.seed, self.stage.name, "projector"))
        loss = InverseFeatureLoss(
            dims, self.stage.feature_weight, cap=self.chain.cap, projector=self.chain.projector
        )
        for name, layer in loss.projectors.items():
            say(f"projector for {name}: {tuple(layer.weight.shape)}")  # pyright: ignore
        return loss

    def run(self, out: Path, *, resume: bool = False) -> StageResult:
        """Train to the end.

        Args:
            out: Folder of ``metrics.jsonl`` and ``checkpoints``.
            resume: Go on from the newest good checkpoint.

        Raises:
            NonFiniteError: If a loss or gradient is NaN or infinite.
            InputError: If more than 1 % of the samples cannot be read.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        root = out / "checkpoints"
        start = self._restore(root) if resume else 0
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
        with (
            StopSignal() as stop,
            RunLog(out, resume_step=start or None, every=self.chain.log_every) as log,
            log.progress(f"training {self.stage.name}", self.steps) as bar,
        ):
            bar.advance(start)
            began, before = time.monotonic(), self.seconds
            batches = self.batches.run(start, self.steps)
            for step in range(start + 1, self.steps + 1):
                total, terms, rate = self._step(step, next(batches), root)
                self.seconds = before + time.monotonic() - began
                if step % self.chain.log_every == 0 or step == self.steps:
                    named = {name: float(value) for name, value in terms.items()}
                    log.log(step, {"loss": float(total), **named, "lr": rate})
                bar.advance(loss=float(total))
                if step == start + 10:
                    self._estimate((time.monotonic() - began) / 10, step)
                last = step == self.steps or self._stopping(stop)
                if step % self.chain.save_every == 0 or last:
                    self._save(root, step)
                stop.check()
        if self.batches.readable.bad:
            warn(f"{len(self.batches.readable.bad)} unreadable samples were replaced by others")
        samples = self.steps * self.stage.batch_size
        return StageResult(self._result(), self.steps, samples, self.seconds, self.skipped)

    def _result(self) -> nn.Module:
        if not self.sharded:
            return self.module.model.eval()
        fill(self.plain, whole(self.module.model.state_dict()))
        return self.plain.to(self.accelerator.device).eval()

    def _stopping(self, stop: StopSignal) -> bool:
        """Whether any process was asked to stop: gathering shards takes them all."""
        if not self.sharded:
            return stop.requested
        asked = torch.tensor(float(stop.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked) > 0)

    def _step(
        self, step: int, batch: Any, root: Path
    ) -> tuple[Tensor, Mapping[str, Tensor], float]:
        accelerator, stage = self.accelerator, self.stage
        rate = learning_rate(
            step - 1, self.steps, stage.warmup_steps, stage.lr, self.chain.lr_floor
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout and the like: the same in a resumed run, different on every process.
        torch.manual_seed(seed_of(self.chain.seed, stage.name, step, accelerator.process_index))
        total, terms = train_step(
            self.module,
            self.wrapped,
            self.predecessor,
            to_device(batch, accelerator.device),
            self.optimizer,
            accelerator,
            micro_batches=self.chain.accum_freq,
            step=step,
            last_good=root,
        )
        self._count_skips(step, root)
        self._warn_if_larger(terms)
        return total, terms, rate

    def _count_skips(self, step: int, root: Path) -> None:
        if self.accelerator.scaler is None or not self.accelerator.optimizer_step_was_skipped:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= SKIPS:
            raise NonFiniteError(
                f"fp16 skipped {SKIPS} updates in a row at step {step} (last good checkpoint: {root}); "
                "use bf16 or lower the learning rate"
            )

    def _warn_if_larger(self, terms: Mapping[str, Tensor]) -> None:
        if self.chain.cap != "warn" or self._capped or "feature" not in terms:
            return
        rest = sum(float(value) for name, value in terms.items() if name != "feature")
        if float(terms["feature"]) > rest:
            self._capped = True
            warn(
                f"the feature loss {float(terms['feature']):.3g} is above the task loss {rest:.3g}; "
                "lower feature_weight or set cap: scale"
            )

    def _restore(self, root: Path) -> int:
        found = checkpoint.latest(root)
        if found is None:
            return 0
        if self.sharded:
            found = in_shards(found, self.module, self.optimizer)
        extra = restore_training_state(found, self.module, self.optimizer)
        self.seconds, self.skipped = extra["seconds"], extra["skipped"]
        self._in_a_row = extra["in_a_row"]
        self.batches.readable.bad.update({int(k): v for k, v in extra["bad"].items()})
        if self.accelerator.scaler is not None and extra["scaler"]:
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        say(f"{self.stage.name}: resuming after step {found.step}")
        return found.step

    def _save(self, root: Path, step: int) -> None:
        scaler = self.accelerator.scaler
        tensors, state = training_state(
            self.module,
            self.optimizer,
            seconds=self.seconds,
            skipped=self.skipped,
            in_a_row=self._in_a_row,
            bad={str(k): v for k, v in self.batches.readable.bad.items()},
            scaler=scaler.state_dict() if scaler is not None else None,
        )
        if self.sharded:
            tensors, state = whole(tensors), whole(state)
        if not (root / f"step-{step}").exists():
            checkpoint.save(root, step, tensors, state)

    def _estimate(self, seconds: float, step: int) -> None:
        left = seconds * (self.steps - step)
        if left > 60:
            numbers = sum(p.numel() for p in self.module.parameters())
            say(
                f"{self.stage.name}: about {left / 60:.1f} minutes for {self.steps} updates; "
                f"{3 * 4 * numbers / 2**20:.0f} MiB a checkpoint, two are kept"
            )


def make_accelerator(precision: str, device: torch.device | None = None) -> Any:
    """An accelerator of a precision on a device.

    Among several processes (torchrun, accelerate launch) every one computes on its own card of the
    device's kind, over NCCL; on CPUs they talk over gloo.

    Args:
        precision: fp32, bf16 or fp16.
        device: Where to compute; None leaves the choice to accelerate.

    Raises:
        ConfigError: If the device cannot do it, or accelerate was launched for another kind.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise ConfigError("precision fp16 needs a GPU; use bf16 or fp32")

    # It keeps the first precision and device of a process; a process group stays what it is.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    if device is None:
        return Accelerator(mixed_precision=AMP[precision])

    # Alone it takes exactly this device; among several each process has a card of its own.
    chosen = {"ACCELERATE_TORCH_DEVICE": str(device)} if alone else {}
    with patch_environment(**chosen):
        accelerator = Accelerator(mixed_precision=AMP[precision], cpu=device.type == "cpu")
    if accelerator.device.type != device.type:
        kind = accelerator.device.type
        raise ConfigError(f"accelerate was launched for {kind}, not {device}; add --device {kind}")
    return accelerator


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
