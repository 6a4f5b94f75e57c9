"""The loop of ``train``: updates, averages, checkpoints. It knows no command line."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.checkpoint import restore_training_state, set_rng_state, training_state
from effml_common.errors import ConfigError
from effml_common.folders import check_same_settings
from effml_common.logging import RunLog, say, warn
from effml_common.stopping import StopSignal, check_finite
from scalekd.adapters.task import TERM_NAMES, ScaleKDTask
from scalekd.adapters.teacher import TeacherOut
from scalekd.training.loaders import move_batch
from scalekd.training.plan import TrainingPlan
from scalekd.training.processes import Processes
from scalekd.training.recipe import Recipe

NEGLIGIBLE_SHARE = 0.01  # of the loss, under which a term is warned about
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BYTES_PER_WEIGHT = 4  # float32
MIB = 2**20  # bytes
CachedTeacher = Callable[[Tensor, int], TeacherOut]  # (indices, view) -> the teacher's pass
# Images, labels, and the teacher's pass over them if it is known.
Batch = tuple[Tensor, Tensor, TeacherOut | None]


def training_step(
    task: ScaleKDTask,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    amp: torch.dtype | None = None,
    clip: float = 0.0,
    step: int = 0,
    last_good: Path | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Tensor]:
    """Make one update: passes, gradients, the check that they are finite, the optimizer.

    Args:
        task: In training mode.
        batches: One or, for accumulated gradients, several; on the device of the task.
        optimizer: Of what the task trains.
        scaler: For float16, whose overflowing updates it skips.
        amp: Type of the mixed precision; None is none.
        clip: Largest norm of the gradient; 0 for no limit.
        step: Number of the update, for the error.
        last_good: Folder of checkpoints, for the error.
        stop: Signals, which the processes agree on in the same reduction.

    Returns:
        The task's result for the last batch, and ``grad_norm``.

    Raises:
        NonFiniteError: If a loss or gradient is not finite; then nothing is updated.
    """
    assert not task.split.model.training, "the teacher must stay in evaluation mode"
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    result: dict[str, Tensor] = {}

    # Gradients of every batch; processes exchange them at the last one only.
    optimizer.zero_grad(set_to_none=True)
    for i, (images, labels, teacher) in enumerate(batches):
        last = i == len(batches) - 1
        with (
            nullcontext() if last else task.no_sync(),
            torch.autocast(images.device.type, amp) if amp else nullcontext(),
        ):
            result = task(images, labels, teacher)
            scaler.scale(result["loss"] / len(batches)).backward()

    # Nothing is changed when a value is not finite.
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(task.get_clip_parameters(), clip or float("inf"))
    bad = [n for n, v in result.items() if n != "output" and not torch.isfinite(v).all()]
    checked_norm = None if scaler.is_enabled() else norm  # the scaler skips updates that overflow
    check_finite(
        result["loss"].detach(),
        checked_norm,
        step=step,
        term=" and ".join(bad) or "loss",
        last_good=last_good,
        stop=stop,
    )
    scaler.step(optimizer)
    scaler.update()
    return {**result, "grad_norm": norm}


def prepare_trainer(
    plan: TrainingPlan,
    processes: Processes,
    task: ScaleKDTask,
    loader: Any,
    cached: CachedTeacher | None,
) -> "Trainer":
    """Build optimizer and schedule, wrap the networks, and join all in a loop that is ready to run.

    Args:
        plan: Settings.
        processes: For DDP.
        task: Not yet wrapped, compiled or averaged.
        loader: Training batches of this process.
        cached: Teacher outputs by index and view, instead of the live teacher.

    Raises:
        ConfigError: If there are too few batches for one update.
    """
    # How long it will take, and how much disk.
    config, recipe = plan.config, plan.recipe
    updates = len(loader) // config.grad_accum  # per epoch
    if updates < 1:
        raise ConfigError(
            f"{len(loader)} batches do not fill one update of {config.grad_accum}; lower "
            "--batch-size or --grad-accum, or add images"
        )
    _announce(recipe, updates, task.trainable_module)

    # Optimizer and schedule, for the bare networks.
    optimizer = create_optimizer(task.trainable_module, recipe)
    scheduler = create_scheduler(optimizer, recipe, updates)
    scaler = torch.amp.GradScaler(task.device.type, enabled=config.amp == "fp16")

    # Wrappers around them, the average first: it copies what is not yet wrapped.
    if recipe.ema:
        task.setup_ema(decay=recipe.ema, use_warmup=True)
    if config.compile:
        task.split.compile()
        task.compile()
    if processes.world > 1:
        device_ids = [task.device.index or 0] if task.device.type == "cuda" else None
        task.prepare_distributed(device_ids)

    mixes = config.mixup or config.cutmix
    return Trainer(
        plan=plan,
        processes=processes,
        task=task,
        loader=loader,
        cached=cached,
        updates=updates,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        mixup=(
            Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=config.num_classes)
            if mixes
            else None
        ),
    )


def _announce(recipe: Recipe, updates: int, networks: nn.Module) -> None:
    """Say how many updates there are, and what two checkpoints take on disk."""
    weights = sum(p.numel() for p in networks.parameters())
    copies = 3 + (recipe.ema > 0)  # weights, two moments, average
    size = 2 * copies * BYTES_PER_WEIGHT * weights / MIB
    say(
        f"{updates * recipe.epochs} updates of {recipe.batch_size} images; about {size:.0f} MiB of "
        "disk for two checkpoints; the time follows after the first updates"
    )


def create_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create the optimizer of a recipe, for all that a module trains."""
    # timm's rule leaves out biases and norms; the SGD and LAMB recipes decay all.
    return create_optimizer_v2(
        module,
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_all,
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int
) -> Any:
    """Create timm's schedule of the learning rate, moved after every update."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        num_epochs=recipe.epochs,
        decay_milestones=list(recipe.milestones),
        decay_rate=0.1,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr * recipe.warmup_factor,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert scheduler is not None
    return scheduler


@dataclass(kw_only=True)
class Trainer:
    """Train a ``ScaleKDTask`` by a recipe.

    Epoch e starts from random states that depend on (seed, e) alone, and a checkpoint within an epoch
    keeps the states and the number of batches seen, so that a resumed run repeats the uninterrupted
    one bit for bit on the CPU.

    Attributes:
        plan: Settings.
        processes: This process among those of the run.
        task: Wrapped, compiled and averaged as the plan has it.
        loader: Training batches of this process.
        cached: Teacher outputs by index and view, instead of the live teacher.
        updates: Number of updates in an epoch.
        optimizer: Of all that the task trains.
        scheduler: Of the learning rate.
        scaler: For float16.
        mixup: Mixes images and labels of a batch.
    """

    plan: TrainingPlan
    processes: Processes
    task: ScaleKDTask
    loader: Any
    cached: CachedTeacher | None
    updates: int
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    mixup: Mixup | None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.plan.run_folder / "checkpoints"

    def run(self) -> None:
        """Train to the end, from the newest good checkpoint if the run is to be resumed.

        Raises:
            CheckpointError: If the checkpoint was made with other settings.
            NonFiniteError: If a loss or gradient is not finite.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        # Where to begin, and with which random states.
        saved = checkpoint.latest(self.checkpoints) if self.plan.config.resume == "auto" else None
        rng = self._restore(saved) if saved else None
        step = saved.step if saved else 0
        total = self.updates * self.plan.recipe.epochs
        save_every = self.plan.config.save_every or self.updates

        # One update after another; a stop signal waits until the update is saved.
        self.task.train()
        with (
            StopSignal() as stop,
            RunLog(
                self.plan.run_folder, resume_step=step or None, every=self.plan.config.log_every
            ) as log,
            log.progress("training", total) as bar,
        ):
            bar.advance(step)
            while step < total:
                epoch, skip = divmod(step, self.updates)
                for batches in self._epoch_batches(epoch, skip, rng):
                    step += 1
                    result = self._update(batches, epoch, step, stop)
                    if step == 1 or step % self.plan.config.log_every == 0 or step == total:
                        self._log(log, step, result)
                    bar.advance()

                    if step % save_every == 0 or step == total or stop.requested:
                        self._save(step)
                    stop.check()
                rng = None

    def _epoch_batches(self, epoch: int, skip: int, rng: Any) -> Iterator[list[Any]]:
        """Batches of each update of an epoch, after the first ``skip`` updates.

        ``rng`` holds the random states of a checkpoint within this epoch.
        """
        # The states in which the epoch starts.
        seed = self.plan.config.seed * 1_000_003 + epoch * 1009 + self.processes.rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (timm's augmentations draw from it)
        random.seed(seed)

        # Order and views change with the epoch.
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        dataset: Any = self.loader.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if getattr(dataset, "views", None):
            dataset.view = epoch % dataset.views

        # Past what a resumed run has seen; an epoch's start has random states of its own.
        batches = iter(self.loader)
        per_update = self.plan.config.grad_accum
        for _ in range(skip * per_update):
            next(batches)
        if rng is not None and skip:
            set_rng_state(rng)
        for _ in range(self.updates - skip):
            yield [next(batches) for _ in range(per_update)]

    def _update(
        self, batches: list[Any], epoch: int, step: int, stop: StopSignal
    ) -> dict[str, Tensor]:
        """Make one update, and move the schedule and the average along."""
        result = training_step(
            self.task,
            [self._prepare(batch) for batch in batches],
            self.optimizer,
            scaler=self.scaler,
            amp=AMP_TYPES.get(self.plan.config.amp),
            clip=self.plan.recipe.clip,
            step=step,
            last_good=self.checkpoints,
            stop=stop,
        )

        self.scheduler.step_update(num_updates=step)
        self.task.update_ema(step=step)
        if step % self.updates == 0:
            self.scheduler.step(epoch + 1)
        return result

    def _prepare(self, batch: Any) -> Batch:
        """Move a batch of the loader to the device, mix it, and look the teacher up in the cache."""
        x, y, indices = move_batch(batch, self.task.device, self.plan.config.channels_last)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        view = getattr(self.loader.dataset, "view", 0)
        return x, y, None if self.cached is None else self.cached(indices, view)

    def _log(self, log: RunLog, step: int, result: dict[str, Tensor]) -> None:
        """Write every term of the loss, its share, and the cosines behind the feature terms."""
        shares = self.task.shares(result)
        terms = {n: float(v.detach()) for n, v in result.items() if n != "output"}
        feature_terms = [name for name in terms if name in TERM_NAMES.values()]
        cosines = {f"cosine_{name}": 1 - terms[name] / 2 for name in feature_terms}
        rounded = {f"share_{name}": round(value, 5) for name, value in shares.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        log.log(step, {**terms, **cosines, **rounded, "lr": rate})

        # Once, since a weight that does not fit the pair is seen in the first update.
        if step == 1:
            percent = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares.items())
            say(f"share of the loss at the first step: {percent}")
            for name, value in shares.items():
                if value < NEGLIGIBLE_SHARE:
                    warn(f"{name} is {100 * value:.2f} % of the loss; check the weights")

    def _save(self, step: int) -> None:
        if self.processes.rank or (self.checkpoints / f"step-{step}").exists():
            return
        ema = self.task.inner(ema=True).state_dict() if self.task.has_ema() else None
        tensors, state = training_state(
            self.task.inner(), self.optimizer, ema=ema, scaler=self.scaler.state_dict()
        )
        settings = self.plan.fixed_settings()
        checkpoint.save(self.checkpoints, step, tensors, state, config=settings)

    def _restore(self, saved: checkpoint.Checkpoint) -> Any:
        """Put everything back in place; returns the random states, which the epoch sets later."""
        check_same_settings(saved.config, self.plan.fixed_settings(), place=saved.path)
        extra = restore_training_state(saved, self.task.inner(), self.optimizer)
        if extra["ema"] is not None:
            self.task.inner(ema=True).load_state_dict(extra["ema"])
        self.scaler.load_state_dict(extra["scaler"])
        self.scheduler.step_update(num_updates=saved.step)
        say(f"resuming after update {saved.step}")
        return saved.state["rng"]
