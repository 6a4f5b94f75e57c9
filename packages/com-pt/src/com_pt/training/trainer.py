"""Trains a stage on accelerate: the loop, its checkpoints, the predecessor beside it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from com_pt.adapters.sharding import gather_shards, load_gathered, split_checkpoint
from com_pt.training.data.loading import seed_of
from com_pt.training.prepare import PreparedStage
from com_pt.training.schedule import learning_rate
from com_pt.training.step import train_step
from effml_common import checkpoint
from effml_common.checkpoint import restore_training_state, training_state
from effml_common.errors import NonFiniteError
from effml_common.logging import RunLog, say, warn
from effml_common.stopping import StopSignal

MOST_SKIPS = 3  # updates in a row that fp16's scaler may leave out
TIMED_UPDATES = 10  # updates after which the remaining time is estimated


@dataclass
class StageResult:
    """A finished stage: its model, what it saw, and how long it took (all runs together)."""

    model: nn.Module
    steps: int
    samples: int
    seconds: float
    skipped: int


class StageTrainer:
    """Trains one stage, with learning rates, checkpoints and stop signals.

    Args:
        prepared: Modules, optimizer and batches of the stage.
    """

    def __init__(self, prepared: PreparedStage) -> None:
        self.chain, self.stage = prepared.chain, prepared.settings
        self.accelerator, self.optimizer = prepared.accelerator, prepared.optimizer
        self.module, self.wrapped = prepared.module, prepared.wrapped
        self.predecessor, self.unsharded = prepared.predecessor, prepared.unsharded
        self.batches, self.steps = prepared.batches, prepared.steps

        # What a checkpoint holds beside them.
        self.seconds, self.skipped, self._skips_in_a_row = 0.0, 0, 0
        self._has_warned = False

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
        # Go on from a checkpoint, if that is asked for and there is one.
        root = out / "checkpoints"
        start = self._restore(root) if resume else 0
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)

        # Train; a signal stops the run after a checkpoint.
        with (
            StopSignal() as stop,
            RunLog(out, resume_step=start or None, every=self.chain.log_every) as log,
            log.progress(f"training {self.stage.name}", self.steps) as bar,
        ):
            bar.advance(start)
            began, seconds_before = time.monotonic(), self.seconds
            batches = self.batches.run(start, self.steps)
            for step in range(start + 1, self.steps + 1):
                loss, terms, rate = self._step(step, next(batches), root)
                self.seconds = seconds_before + time.monotonic() - began

                # Tell how it goes.
                if step % self.chain.log_every == 0 or step == self.steps:
                    values = {name: float(value) for name, value in terms.items()}
                    log.log(step, {"loss": float(loss), **values, "lr": rate})
                bar.advance(loss=float(loss))
                if step == start + TIMED_UPDATES:
                    self._estimate((time.monotonic() - began) / TIMED_UPDATES, step)

                # Keep what was learned.
                is_last = step == self.steps or self._stop_is_requested(stop)
                if step % self.chain.save_every == 0 or is_last:
                    self._save(root, step)
                stop.check()

        # Hand over the model, complete and without its projectors.
        if self.batches.readable.bad:
            warn(f"{len(self.batches.readable.bad)} unreadable samples were replaced by others")
        model = self.module.model
        if self.unsharded is not None:
            load_gathered(self.unsharded, gather_shards(model.state_dict()))
            model = self.unsharded.to(self.accelerator.device)
        samples = self.steps * self.stage.batch_size
        return StageResult(model.eval(), self.steps, samples, self.seconds, self.skipped)

    def _stop_is_requested(self, stop: StopSignal) -> bool:
        """Return whether any process was asked to stop: gathering shards takes them all."""
        if self.unsharded is None:
            return stop.requested
        requested = torch.tensor(float(stop.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(requested) > 0)

    def _step(
        self, step: int, batch: Any, root: Path
    ) -> tuple[Tensor, Mapping[str, Tensor], float]:
        """Make one update; returns the loss, its terms and the learning rate."""
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
        loss, terms = train_step(
            self.module,
            self.wrapped,
            self.predecessor,
            batch,
            self.optimizer,
            accelerator,
            micro_batches=self.chain.accum_freq,
            step=step,
            last_good=root,
        )

        # Signs that the settings do not fit.
        self._count_skips(step, root)
        self._warn_if_larger(terms)
        return loss, terms, rate

    def _count_skips(self, step: int, root: Path) -> None:
        if self.accelerator.scaler is None or not self.accelerator.optimizer_step_was_skipped:
            self._skips_in_a_row = 0
            return
        self.skipped += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row >= MOST_SKIPS:
            raise NonFiniteError(
                f"fp16 skipped {MOST_SKIPS} updates in a row at step {step} (last good checkpoint: "
                f"{root}); use bf16 or lower the learning rate"
            )

    def _warn_if_larger(self, terms: Mapping[str, Tensor]) -> None:
        if self.chain.cap != "warn" or self._has_warned or "feature" not in terms:
            return
        task_loss = sum(float(value) for name, value in terms.items() if name != "feature")
        if float(terms["feature"]) > task_loss:
            self._has_warned = True
            warn(
                f"the feature loss {float(terms['feature']):.3g} is above the task loss "
                f"{task_loss:.3g}; lower feature_weight or set cap: scale"
            )

    def _restore(self, root: Path) -> int:
        """Restore the newest good checkpoint; returns its step, 0 without one."""
        newest = checkpoint.latest(root)
        if newest is None:
            return 0

        # Weights, moments and random states.
        if self.unsharded is not None:
            newest = split_checkpoint(newest, self.module, self.optimizer)
        extra = restore_training_state(newest, self.module, self.optimizer)

        # Counts, and the scaler of fp16.
        self.seconds, self.skipped = extra["seconds"], extra["skipped"]
        self._skips_in_a_row = extra["in_a_row"]
        self.batches.readable.bad.update({int(k): v for k, v in extra["bad"].items()})
        if self.accelerator.scaler is not None and extra["scaler"]:
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        say(f"{self.stage.name}: resuming after step {newest.step}")
        return newest.step

    def _save(self, root: Path, step: int) -> None:
        """Save a checkpoint of complete tensors."""
        scaler = self.accelerator.scaler
        tensors, state = training_state(
            self.module,
            self.optimizer,
            seconds=self.seconds,
            skipped=self.skipped,
            in_a_row=self._skips_in_a_row,
            bad={str(k): v for k, v in self.batches.readable.bad.items()},
            scaler=scaler.state_dict() if scaler is not None else None,
        )
        if self.unsharded is not None:
            tensors, state = gather_shards(tensors), gather_shards(state)
        if not (root / f"step-{step}").exists():
            checkpoint.save(root, step, tensors, state)

    def _estimate(self, seconds: float, step: int) -> None:
        """Say how long the stage will take, if that is more than a minute."""
        remaining = seconds * (self.steps - step)
        if remaining > 60:
            numbers = sum(p.numel() for p in self.module.parameters())
            say(
                f"{self.stage.name}: about {remaining / 60:.1f} minutes for {self.steps} updates; "
                f"{3 * 4 * numbers / 2**20:.0f} MiB a checkpoint, two are kept"
            )
