"""Trains a Dot on accelerate: the loop, its averages, its checkpoints."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.errors import ConfigError, InputError
from effml_common.finite import check_finite
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, say, warn
from effml_common.state import restore_training_state, training_state
from morse_diffusion.jumps import Process
from morse_diffusion.objective import (
    Draws,
    Estimate,
    Pair,
    draw,
    make_pair,
    min_snr_weight,
    nested,
    pair_losses,
)

FAILING = 0.9  # of the residual left after the first half of a run


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything a run draws from, in memory.

    Args:
        clean: Images or latents, [n, ...].
        cond: Nested dict of tensors [n, ...]: the Dash's other inputs per sample.
    """

    clean: Tensor
    cond: dict[str, Any] = field(default_factory=dict)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """Samples and their conditions, on a device."""
        return self.clean[index].to(device), nested(self.cond, lambda t: t[index].to(device))


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop; ``config.TrainDotConfig`` documents and checks them."""

    steps: int
    batch: int
    lr: float = 1e-4
    ema: float = 0.999
    clip: float = 1.0
    gap_max: float = 1.0
    rollout: float = 0.0
    cosine: bool = False
    min_snr: bool = False
    guidance: tuple[float, float] | None = None
    seed: int = 0
    save_every: int = 1000
    log_every: int = 10


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one update learns from, on the device that it is made on.

    Attributes:
        clean: Images or latents, [b, ...].
        cond: The Dash's other inputs.
        draws: Random numbers.
    """

    clean: Tensor
    cond: dict[str, Any]
    draws: Draws


class DotTrainer:
    """Algorithm 1 with AdamW, an exponential average of the weights, and resuming.

    Every random number of step n comes from a generator seeded with (seed, n) for the whole batch, of
    which each process takes its part. So a resumed run repeats the uninterrupted one, and several
    processes repeat the single one.

    Args:
        dash: Frozen estimate in the residual space.
        dot: The Dot; trained in place, and left with the averaged weights.
        process: Noise schedule and jump.
        data: Training data, at least one batch.
        config: Settings.
        accelerator: An ``accelerate.Accelerator``; default one for the device of the Dot.

    Raises:
        ConfigError: If the data are fewer than a batch, or the batch cannot be split evenly.
    """

    def __init__(
        self,
        dash: Estimate,
        dot: nn.Module,
        process: Process,
        data: TrainingData,
        config: LoopConfig,
        accelerator: Any = None,
    ) -> None:
        device = next(dot.parameters()).device
        self.accelerator = accelerator or accelerator_on(device)
        self.dash, self.data, self.config = dash, data, config
        self.process = process.to(self.accelerator.device)
        world = self.accelerator.num_processes
        if len(data.clean) < config.batch:
            raise ConfigError(
                f"{len(data.clean)} training samples are fewer than one batch of {config.batch}; "
                "add images or lower --batch"
            )
        if config.batch % world:
            raise ConfigError(
                f"a batch of {config.batch} cannot be split over {world} processes; "
                f"use a multiple of {world}"
            )
        self.dot = dot.train()
        optimizer = torch.optim.AdamW(self.dot.parameters(), lr=config.lr, weight_decay=0.0)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.dot, optimizer)
        self.average = {k: p.detach().clone() for k, p in self.dot.named_parameters()}
        self.left = 1.0

    def run(
        self,
        out: Path | None = None,
        *,
        resume: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> float:
        """Train; returns the part of the residual that is left (smoothed over about 50 steps).

        Args:
            out: Folder for ``metrics.jsonl`` and ``checkpoints``; None keeps neither.
            resume: Continue from the newest good checkpoint in it.
            settings: Kept in each checkpoint.

        Raises:
            NonFiniteError: If the loss or the gradient is not finite.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        root = None if out is None else out / "checkpoints"
        start = self._restore(root) if resume and root is not None else 0
        if root is not None and self.accelerator.is_main_process:
            root.parent.mkdir(parents=True, exist_ok=True)
        steps = self.config.steps
        with (
            StopSignal() as stop,
            RunLog(out, resume_step=start or None, every=self.config.log_every) as log,
            log.progress("training the Dot", steps) as bar,
        ):
            bar.advance(start)
            began = time.monotonic()
            for step in range(start + 1, steps + 1):
                loss = self._step(step, root)
                if step % self.config.log_every == 0 or step == steps:
                    log.log(step, {"loss": loss, "residual left": self.left})
                if step == start + 5:
                    self._estimate(5, time.monotonic() - began, steps - start)
                bar.advance(residual_left=self.left)
                self._warn_if_failing(step)
                last = step == steps or stop.requested
                if root is not None and (step % self.config.save_every == 0 or last):
                    self._save(root, step, settings)
                stop.check()
        self._use_average()
        return self.left

    def _step(self, step: int, root: Path | None) -> Tensor:
        config, accelerator = self.config, self.accelerator
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index = torch.randint(len(self.data.clean), (config.batch,), generator=generator)
        clean, cond = self.data.batch(index, accelerator.device)
        draws = draw(
            self.process,
            clean.shape,
            generator,
            guidance=config.guidance,
            gap_max=config.gap_max,
        )
        batch = Batch(clean=clean, cond=cond, draws=draws.to(accelerator.device))

        if config.cosine:
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
            self.optimizer.param_groups[0]["lr"] = rate
        rolled = step > config.steps * (1 - config.rollout)
        error, left = update_dot(
            self.wrapped,
            batch,
            self.optimizer,
            dash=self.dash,
            process=self.process,
            config=config,
            accelerator=accelerator,
            step=step,
            middle=self.dot if rolled else None,
            last_good=root,
        )
        self.left += (left - self.left) / min(50, step)
        update_average(self.average, self.dot, min(config.ema, (1 + step) / (10 + step)))
        return error

    def _restore(self, root: Path) -> int:
        found = checkpoint.latest(root)
        if found is None:
            say("nothing to resume from; starting at step 0")
            return 0
        extra = restore_training_state(found, self.dot, self.optimizer)
        device = self.accelerator.device
        self.average = {k: v.to(device) for k, v in extra["average"].items()}
        self.left = extra["left"]
        say(f"resuming after step {found.step}")
        return found.step

    def _save(self, root: Path, step: int, settings: dict[str, Any] | None) -> None:
        tensors, state = training_state(
            self.dot, self.optimizer, average=self.average, left=self.left
        )
        if not (root / f"step-{step}").exists():
            checkpoint.save(root, step, tensors, state, config=settings or {})

    def _use_average(self) -> None:
        with torch.no_grad():
            for name, p in self.dot.named_parameters():
                p.copy_(self.average[name])
        self.dot.eval()

    def _estimate(self, done: int, seconds: float, steps: int) -> None:
        size = 3 * sum(p.numel() for p in self.dot.parameters()) * 4 / 2**20
        say(
            f"about {seconds / done * steps / 60:.1f} minutes for {steps} steps; "
            f"{size:.0f} MiB a checkpoint, two are kept"
        )

    def _warn_if_failing(self, step: int) -> None:
        if step == max(1, self.config.steps // 2) and self.left > FAILING:
            warn(
                f"after {step} steps {self.left:.0%} of the residual is left: the Dot is not "
                "learning; raise --lr, --rank or --channels, or lower --gap-max"
            )


def update_dot(
    model: nn.Module,
    batch: Batch,
    optimizer: Any,
    *,
    dash: Estimate,
    process: Process,
    config: LoopConfig,
    accelerator: Any,
    step: int,
    middle: Callable[..., Tensor] | None = None,
    last_good: Path | None = None,
) -> tuple[Tensor, float]:
    """Make one update of a Dot; nothing is moved between devices and nothing is logged.

    Args:
        model: The Dot, as accelerate wraps it.
        batch: Of all processes; each learns from its part.
        optimizer: Of the Dot's weights.
        dash: See ``DotTrainer``.
        process: See ``DotTrainer``; on the device of the batch.
        config: See ``DotTrainer``.
        accelerator: See ``DotTrainer``.
        step: Number of this update, from 1.
        middle: See ``make_pair``.
        last_good: Checkpoint that an error names.

    Returns:
        Mean squared error, a scalar on the device, and the share of the residual that is left.

    Raises:
        NonFiniteError: If the loss or the gradient is not finite; then nothing is changed.
    """
    # What the Dash says at two times, and what the Dot makes of the first.
    with accelerator.autocast():
        pair = make_pair(dash, process, batch.clean, batch.draws, cond=batch.cond, middle=middle)
        pair = share_of(pair, accelerator)
        error, size = pair_losses(model, pair)
        loss = (error * min_snr_weight(process, pair.t_o) if config.min_snr else error).mean()

    # One update.
    optimizer.zero_grad()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
    check_finite(loss.detach(), norm, step=step, term="squared residual", last_good=last_good)
    optimizer.step()

    # Averages over all processes.
    both = accelerator.reduce(torch.stack([error.detach().mean(), size.mean()]), "mean")
    return both[0], float(both[0] / both[1].clamp(min=1e-12))


def share_of(pair: Pair, accelerator: Any) -> Pair:
    """The part of a batch of all processes that this one learns from."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    return Pair(**nested(vars(pair), lambda t: t[mine]))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move an exponential average of a model's weights towards what they are now, in place."""
    for name, weight in model.named_parameters():
        average[name].lerp_(weight, 1 - decay)


def accelerator_on(device: torch.device, precision: str = "no") -> Any:
    """An ``accelerate.Accelerator`` that computes on a device.

    Among several processes every one computes on its own card of the device's kind.

    Args:
        device: As ``resolve_device`` gives it.
        precision: ``no`` or ``bf16``.

    Raises:
        InputError: If accelerate was launched for another kind of device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    # It keeps the first precision and device of a process; a process group stays what it is.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    chosen = {"ACCELERATE_TORCH_DEVICE": str(device)} if alone else {}
    with patch_environment(**chosen):
        accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    kind = accelerator.device.type
    if kind != device.type:
        raise InputError(f"accelerate was launched for {kind}, not {device}; add --device {kind}")
    return accelerator
