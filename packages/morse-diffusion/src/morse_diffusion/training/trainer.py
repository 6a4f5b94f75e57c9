"""Train a Dot by Algorithm 1 of the Morse paper on accelerate.

The loop, the average of the weights that sampling uses, and checkpoints from which a stopped run
continues bit for bit.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.checkpoint import restore_training_state, training_state
from effml_common.errors import ConfigError
from effml_common.folders import check_same_settings
from effml_common.logging import RunLog, say, warn
from effml_common.stopping import StopSignal, check_finite
from morse_diffusion.method.jumps import Process
from morse_diffusion.method.objective import (
    Draws,
    Estimate,
    Pair,
    draw,
    make_pair,
    map_tensors,
    min_snr_weight,
    residual_losses,
)
from morse_diffusion.training.accelerator import accelerator_on
from morse_diffusion.training.data import TrainingData

FAILING_SHARE = 0.9  # of the residual that is unexplained after half of a run
SMOOTHING_STEPS = 50  # over which the unexplained share is averaged
SEED_STRIDE = 1_000_003  # a prime, so that (seed, step) pairs do not share generators
TIMED_STEPS = 5  # from which the time of the whole run is estimated


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
    """What one update learns from, on the device that it computes on.

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

    >>> class Scale(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = torch.nn.Parameter(torch.zeros(()))
    ...     def forward(self, x_s, x_i, z_s, t_s, t_i, cond=None):
    ...         return self.factor * (x_i - x_s)
    >>> process = Process(family="vp", levels=torch.linspace(0.99, 0.01, 100), steps=100)
    >>> data = TrainingData(clean=torch.ones(8, 2))
    >>> dash = lambda x, t, cond, w: 0.5 * x
    >>> loop = LoopConfig(steps=2, batch=4)
    >>> 0 < DotTrainer(dash, Scale(), process, data, loop).run() < 2
    True
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

        # Every process must be able to take an equal share of a full batch.
        processes = self.accelerator.num_processes
        if len(data.clean) < config.batch:
            raise ConfigError(
                f"{len(data.clean)} training samples are fewer than one batch of {config.batch}; "
                "add images or lower --batch"
            )
        if config.batch % processes:
            raise ConfigError(
                f"a batch of {config.batch} cannot be split over {processes} processes; "
                f"use a multiple of {processes}"
            )

        self.dot = dot.train()
        optimizer = torch.optim.AdamW(self.dot.parameters(), lr=config.lr, weight_decay=0.0)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.dot, optimizer)
        self.average = {k: p.detach().clone() for k, p in self.dot.named_parameters()}
        self.unexplained = 1.0  # share of the squared residual that the Dot does not predict
        self.restored_step = 0

    def restore(self, out: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Go back to the newest good checkpoint of a run; without one start at step 0.

        Args:
            out: Folder that ``run`` was given.
            settings: Must equal those that the checkpoint was saved with; None compares nothing.

        Raises:
            CheckpointError: If the settings differ, or the checkpoint is of another Dot.
        """
        saved = checkpoint.latest(out / "checkpoints")
        if saved is None:
            say("nothing to resume from; starting at step 0")
            return
        if settings is not None:
            check_same_settings(saved.config, settings, place=saved.path)

        extra = restore_training_state(saved, self.dot, self.optimizer)
        device = self.accelerator.device
        self.average = {k: v.to(device) for k, v in extra["average"].items()}
        self.unexplained = extra["left"]
        self.restored_step = saved.step
        say(f"resuming after step {saved.step}")

    def run(
        self,
        out: Path | None = None,
        *,
        resume: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> float:
        """Train, from the start or from where ``restore`` has put the trainer.

        Args:
            out: Folder for ``metrics.jsonl`` and ``checkpoints``; None keeps neither.
            resume: Call ``restore`` first.
            settings: Kept in each checkpoint, and compared when a run is resumed.

        Returns:
            Share of the squared residual that is unexplained, smoothed over about 50 steps.

        Raises:
            NonFiniteError: If the loss or the gradient is not finite.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
            CheckpointError: See ``restore``.
        """
        # Where to start, and where checkpoints go.
        if resume and out is not None:
            self.restore(out, settings)
        root = None if out is None else out / "checkpoints"
        if root is not None and self.accelerator.is_main_process:
            root.parent.mkdir(parents=True, exist_ok=True)

        # The loop; a stop signal is obeyed after the step that it arrives in.
        start, steps = self.restored_step, self.config.steps
        with (
            StopSignal() as stop,
            RunLog(out, resume_step=start or None, every=self.config.log_every) as log,
            log.progress("training the Dot", steps) as bar,
        ):
            bar.advance(start)
            began = time.monotonic()
            for step in range(start + 1, steps + 1):
                loss = self._step(step, root, stop)
                if step % self.config.log_every == 0 or step == steps:
                    log.log(step, {"loss": loss, "residual left": self.unexplained})
                if step == start + TIMED_STEPS:
                    self._announce_time(time.monotonic() - began, steps - start)
                bar.advance(residual_left=self.unexplained)
                self._warn_if_failing(step)
                is_last = step == steps or stop.requested
                if root is not None and (step % self.config.save_every == 0 or is_last):
                    self._save(root, step, settings)
                stop.check()

        self._adopt_average()
        return self.unexplained

    def _step(self, step: int, root: Path | None, stop: StopSignal | None = None) -> Tensor:
        """Make update number ``step``, from 1; returns its mean squared error, on the device."""
        # The same data and random numbers in every process, whatever came before.
        config, accelerator = self.config, self.accelerator
        generator = torch.Generator().manual_seed(config.seed * SEED_STRIDE + step)
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

        # Learning rate and kind of pair depend on how far the run is.
        if config.cosine:
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
            self.optimizer.param_groups[0]["lr"] = rate
        is_rolled_out = step > config.steps * (1 - config.rollout)
        error, unexplained = update_dot(
            self.wrapped,
            batch,
            self.optimizer,
            dash=self.dash,
            process=self.process,
            config=config,
            accelerator=accelerator,
            step=step,
            middle=self.dot if is_rolled_out else None,
            last_good=root,
            stop=stop,
        )

        # Averages: of the share that is unexplained, and of the weights.
        self.unexplained += (unexplained - self.unexplained) / min(SMOOTHING_STEPS, step)
        update_average(self.average, self.dot, min(config.ema, (1 + step) / (10 + step)))
        return error

    def _save(self, root: Path, step: int, settings: Mapping[str, Any] | None) -> None:
        tensors, state = training_state(
            self.dot, self.optimizer, average=self.average, left=self.unexplained
        )
        if not (root / f"step-{step}").exists():
            checkpoint.save(root, step, tensors, state, config=settings or {})

    def _adopt_average(self) -> None:
        """Give the Dot the averaged weights, in eval mode."""
        with torch.no_grad():
            for name, p in self.dot.named_parameters():
                p.copy_(self.average[name])
        self.dot.eval()

    def _announce_time(self, seconds: float, steps: int) -> None:
        """Say how long ``steps`` updates take, from the ``seconds`` of the first few."""
        # Weights and both moments of AdamW, in float32.
        size = 3 * sum(p.numel() for p in self.dot.parameters()) * 4 / 2**20
        say(
            f"about {seconds / TIMED_STEPS * steps / 60:.1f} minutes for {steps} steps; "
            f"{size:.0f} MiB a checkpoint, two are kept"
        )

    def _warn_if_failing(self, step: int) -> None:
        if step == max(1, self.config.steps // 2) and self.unexplained > FAILING_SHARE:
            warn(
                f"after {step} steps {self.unexplained:.0%} of the residual is left: the Dot is not "
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
    stop: StopSignal | None = None,
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
        stop: Signals, which the processes agree on in the same reduction.

    Returns:
        Mean squared error, a scalar on the device, and the share of the residual that is unexplained.

    Raises:
        NonFiniteError: If the loss or the gradient is not finite; then nothing is changed.
    """
    # The Dot predicts what the Dash would have said at the later time.
    with accelerator.autocast():
        pair = make_pair(dash, process, batch.clean, batch.draws, cond=batch.cond, middle=middle)
        pair = process_share(pair, accelerator)
        error, size = residual_losses(model, pair)
        loss = (error * min_snr_weight(process, pair.t_o) if config.min_snr else error).mean()

    # One update; nothing is changed when a value is not finite.
    optimizer.zero_grad()
    accelerator.backward(loss)
    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
    check_finite(
        loss.detach(),
        gradient_norm,
        step=step,
        term="squared residual",
        last_good=last_good,
        stop=stop,
    )
    optimizer.step()

    # Means over all processes; their ratio is the share that is still unexplained.
    means = accelerator.reduce(torch.stack([error.detach().mean(), size.mean()]), "mean")
    return means[0], float(means[0] / means[1].clamp(min=1e-12))


def process_share(pair: Pair, accelerator: Any) -> Pair:
    """Return the part of a batch of all processes that this one learns from."""
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    return Pair(**map_tensors(vars(pair), lambda t: t[share]))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move an exponential average of a model's weights towards what they are now, in place."""
    for name, weight in model.named_parameters():
        average[name].lerp_(weight, 1 - decay)
