"""Trains a stage on accelerate: the loop, its checkpoints, the predecessor beside it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from com_pt.adapters.accelerator import tf32_products
from com_pt.adapters.sharding import gather_shards, load_gathered, split_checkpoint
from com_pt.training.best import BestModel
from com_pt.training.data.loading import seed_of
from com_pt.training.frozen import train_mode
from com_pt.training.optimizer import with_own_settings
from com_pt.training.overflow import OverflowCounter
from com_pt.training.prepare import PreparedStage
from com_pt.training.schedule import learning_rate
from com_pt.training.step import TERM, TOTAL, train_step
from com_pt.training.tasks.base import Task
from effml_common import checkpoint
from effml_common.checkpoint import (
    Checkpoint,
    restore_training_state,
    rng_state,
    set_rng_state,
    training_state,
)
from effml_common.logging import RunLog, Sink, say, warn
from effml_common.stopping import StepMonitor, StopSignal

TIMED_UPDATES = 10  # updates, at least, after which the remaining time is estimated


@dataclass
class StageResult:
    """A finished stage.

    Attributes:
        model: The last model, or the best.
        steps: How many updates it got.
        samples: How many samples it was trained on.
        seconds: How long that took, all runs together, without evaluations.
        skipped: How many updates fp16's scaler left out.
        metrics: Of the model, if it was judged within the stage.
    """

    model: nn.Module
    steps: int
    samples: int
    seconds: float
    skipped: int
    metrics: Mapping[str, float] | None = None


class Clock:
    """Seconds of training, those of earlier runs included and pauses left out."""

    def __init__(self, seconds_before: float) -> None:
        self._before, self._began = seconds_before, time.monotonic()

    @property
    def seconds_of_this_run(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._began

    @property
    def seconds(self) -> float:
        """In all."""
        return self._before + self.seconds_of_this_run

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped


class StageTrainer:
    """Trains one stage, with learning rates, checkpoints and stop signals.

    Args:
        prepared: Modules, optimizer and batches of the stage.
        task: Judges the model within the stage.
        sink: Gets (step, metrics) of every logged step, with the ``stage``.
    """

    def __init__(self, prepared: PreparedStage, task: Task, sink: Sink | None = None) -> None:
        self.task, self.sink = task, sink
        self.chain, self.stage = prepared.chain, prepared.settings
        self.accelerator, self.optimizer = prepared.accelerator, prepared.optimizer
        self.module, self.wrapped = prepared.module, prepared.wrapped
        self.predecessor, self.unsharded = prepared.predecessor, prepared.unsharded
        self.batches, self.steps = prepared.batches, prepared.steps

        # What a checkpoint holds beside them.
        self.start, self.seconds, self.skipped = 0, 0.0, 0
        self._has_warned, self._has_estimated = False, False
        self._metrics: dict[str, float] | None = None  # of the last evaluation

    def restore(self, saved: Checkpoint) -> None:
        """Let ``run`` go on from a checkpoint."""
        # Weights, moments and random states.
        own = with_own_settings(saved.state["optimizer"], self.optimizer)
        saved = replace(saved, state={**saved.state, "optimizer": own})
        if self.unsharded is not None:
            saved = split_checkpoint(saved, self.module, self.optimizer)
        extra = restore_training_state(saved, self.module, self.optimizer)

        # Counts, and the scaler of fp16.
        self.seconds, self.skipped = extra["seconds"], extra["skipped"]
        self.batches.readable.bad.update({int(k): v for k, v in extra["bad"].items()})
        if self.accelerator.scaler is not None and extra["scaler"]:
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        say(f"{self.stage.name}: resuming after step {saved.step}")
        self.start = saved.step

    def run(self, out: Path, stop: StopSignal) -> StageResult:
        """Train to the end.

        Args:
            out: Folder of ``metrics.jsonl`` and ``checkpoints``.
            stop: Signals; all processes agree on them.

        Raises:
            NonFiniteError: If a loss or gradient is NaN or infinite.
            InputError: If more than 1 % of the samples cannot be read.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        # Go on from the checkpoint that was restored, if there was one.
        root, start = out / "checkpoints", self.start
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
        best = BestModel(self.task, self.stage.model, out / "best")
        if self.accelerator.is_main_process and start == 0:
            best.discard()

        # Train; a signal stops the run after a checkpoint.
        counter = self._make_overflow_counter()
        monitor = StepMonitor(self.accelerator.device, stop, root)
        with (
            RunLog(
                out, resume_step=start or None, every=self.chain.log_every, sink=self._named_sink()
            ) as log,
            log.progress(f"training {self.stage.name}", self.steps) as bar,
        ):
            bar.advance(start)
            clock = Clock(self.seconds)
            batches = self.batches.run(start, self.steps)
            for step in range(start + 1, self.steps + 1):
                rate = self._step(step, next(batches), monitor, counter)

                # Tell how it goes: the only place where the host waits for a card.
                is_due = self._is_due(step, stop)
                if is_due:
                    losses = self._read(step, monitor, counter, root)
                    self.seconds = clock.seconds
                    self._estimate(start, step, clock.seconds_of_this_run)
                    with clock.paused():
                        metrics = self._judge(step, best)
                    bar.advance(0, loss=losses["loss"])
                    if metrics or step % self.chain.log_every == 0 or step == self.steps:
                        log.log(step, {**losses, "lr": rate, **metrics})
                bar.advance()

                # Keep what was learned; nothing is saved that was not looked at.
                is_last = step == self.steps or stop.requested
                if is_due and (is_last or step % self.chain.save_every == 0):
                    self._save(root, step)
                    stop.check()
        return self._finish(best)

    def _finish(self, best: BestModel) -> StageResult:
        """Hand over the model, complete, without its projectors and gradients."""
        if self.batches.readable.bad:
            warn(f"{len(self.batches.readable.bad)} unreadable samples were replaced by others")
        self.module.zero_grad()
        model, metrics = self._complete_model(), self._metrics
        if self.chain.keep == "best":
            self.accelerator.wait_for_everyone()
            model, metrics = best.load()
            model.to(self.accelerator.device)
        samples = self.steps * self.stage.batch_size
        return StageResult(model.eval(), self.steps, samples, self.seconds, self.skipped, metrics)

    def _complete_model(self) -> nn.Module:
        """Return the model with complete weights, on the device."""
        model = self.module.model
        if self.unsharded is None:
            return model
        load_gathered(self.unsharded, gather_shards(model.state_dict()))
        return self.unsharded.to(self.accelerator.device)

    def _judge(self, step: int, best: BestModel) -> dict[str, float]:
        """Evaluate the model if it is time, and leave everything for training as it was."""
        every = self.chain.eval_every
        if every == 0 or (step % every and step != self.steps):
            return {}
        random_state = rng_state()
        model = self._complete_model()
        self._metrics = self.task.evaluate(model.eval())
        if self.accelerator.is_main_process:
            best.offer(model, step, self._metrics)
        if self.unsharded is not None:
            self.unsharded.cpu()
        train_mode(self.module)
        set_rng_state(random_state)

        # On the terminal the headline is enough.
        name = self.task.headline
        if name in self._metrics:
            say(f"{self.stage.name}: {name} {self._metrics[name]:.4g} after update {step}")
        return {f"val {name}": value for name, value in self._metrics.items()}

    def _named_sink(self) -> Sink | None:
        sink, name = self.sink, self.stage.name
        if sink is None:
            return None
        return lambda step, metrics: sink(step, {"stage": name, **metrics})

    def _is_due(self, step: int, stop: StopSignal) -> bool:
        """Return whether the host looks at the values of an update.

        On a CPU that costs nothing. On a card it looks at lines of the log, evaluations and checkpoints;
        all ranks must look at the same updates, since what they read there may stop them.
        """
        return (
            self.accelerator.device.type == "cpu"
            or step % self.chain.log_every == 0
            or step % self.chain.save_every == 0
            or (self.chain.eval_every > 0 and step % self.chain.eval_every == 0)
            or step == self.steps
            or stop.requested
        )

    def _read(
        self, step: int, monitor: StepMonitor, counter: OverflowCounter | None, root: Path
    ) -> dict[str, float]:
        """Return the loss and its terms, over all ranks."""
        values = monitor.read().values
        if counter is not None:
            self.skipped = counter.read(step, root)
        terms = {name.removeprefix(TERM): value for name, value in values.items() if TERM in name}
        losses = {"loss": terms.pop(TOTAL), **terms}
        self._warn_if_larger(terms)
        return losses

    def _make_overflow_counter(self) -> OverflowCounter | None:
        accelerator = self.accelerator
        if accelerator.scaler is None:
            return None
        return OverflowCounter(accelerator.scaler, accelerator.device, self.skipped)

    def _step(
        self, step: int, batch: Any, monitor: StepMonitor, counter: OverflowCounter | None
    ) -> float:
        """Make one update; returns the learning rate."""
        accelerator, stage = self.accelerator, self.stage
        rate = learning_rate(
            step - 1, self.steps, stage.warmup_steps, stage.lr, self.chain.lr_floor
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        # Dropout and the like: the same in a resumed run, different on every process.
        device = accelerator.device
        batch = _pytree.tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)
        torch.manual_seed(seed_of(self.chain.seed, stage.name, step, accelerator.process_index))
        with tf32_products(device):
            train_step(
                self.module,
                self.wrapped,
                self.predecessor,
                batch,
                self.optimizer,
                accelerator,
                monitor=monitor,
                overflows=counter,
                micro_batches=self.chain.accum_freq,
                step=step,
            )
        return rate

    def _warn_if_larger(self, terms: Mapping[str, float]) -> None:
        if self.chain.cap != "warn" or self._has_warned or "feature" not in terms:
            return
        task_loss = sum(value for name, value in terms.items() if name != "feature")
        if terms["feature"] > task_loss:
            self._has_warned = True
            warn(
                f"the feature loss {terms['feature']:.3g} is above the task loss {task_loss:.3g}; "
                "lower feature_weight or set cap: scale"
            )

    def _save(self, root: Path, step: int) -> None:
        """Save a checkpoint of complete tensors."""
        scaler = self.accelerator.scaler
        tensors, state = training_state(
            self.module,
            self.optimizer,
            seconds=self.seconds,
            skipped=self.skipped,
            bad={str(k): v for k, v in self.batches.readable.bad.items()},
            scaler=scaler.state_dict() if scaler is not None else None,
        )
        if self.unsharded is not None:
            tensors, state = gather_shards(tensors), gather_shards(state)
        checkpoint.save(root, step, tensors, state)

    def _estimate(self, start: int, step: int, seconds: float) -> None:
        """Say once how long the stage will take, if that is more than a minute."""
        if self._has_estimated or step < start + TIMED_UPDATES:
            return
        self._has_estimated = True
        remaining = seconds / (step - start) * (self.steps - step)
        if remaining > 60:
            numbers = sum(p.numel() for p in self.module.parameters())
            say(
                f"{self.stage.name}: about {remaining / 60:.1f} minutes for {self.steps} updates; "
                f"{3 * 4 * numbers / 2**20:.0f} MiB a checkpoint, two are kept"
            )
