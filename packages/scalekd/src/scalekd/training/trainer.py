"""The loop of ``train``: updates, averages, checkpoints. It knows no command line."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from effml_common import checkpoint
from effml_common.errors import ConfigError
from effml_common.finite import check_finite
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, say, warn
from effml_common.state import restore_training_state, set_rng_state, training_state
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherOut
from scalekd.config import TrainConfig
from scalekd.training.data import on_device
from scalekd.training.processes import Processes
from scalekd.training.recipe import Recipe

SMALL = 0.01  # share of the loss under which a term is reported as negligible
Cached = Callable[[Tensor, int], TeacherOut]  # (indices, view) -> what the teacher made of them
Batch = tuple[
    Tensor, Tensor, TeacherOut | None
]  # images, labels, the teacher's pass if it is known


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

    Returns:
        What the task made of the last batch, and ``grad_norm``.

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
    shown = None if scaler.is_enabled() else norm  # the scaler skips updates that overflow
    check_finite(
        result["loss"].detach(),
        shown,
        step=step,
        term=" and ".join(bad) or "loss",
        last_good=last_good,
    )
    scaler.step(optimizer)
    scaler.update()
    return {**result, "grad_norm": norm}


def optimizer_of(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe, for all that a module trains."""
    # timm's rule leaves out biases and norms; the SGD and LAMB recipes decay all.
    return create_optimizer_v2(
        module,
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_all,
    )


class Trainer:
    """Train a ``ScaleKDTask`` by a recipe.

    Epoch e starts from random states that depend on (seed, e) alone, and a checkpoint within an epoch
    keeps the states and the number of batches seen, so that a resumed run repeats the uninterrupted
    one bit for bit on the CPU.

    Args:
        task: Not yet wrapped, compiled or averaged.
        loader: Training batches of this process.
        config: Settings.
        recipe: Optimisation.
        processes: For DDP.
        cached: Teacher outputs by index and view, instead of the live teacher.
    """

    def __init__(
        self,
        task: ScaleKDTask,
        loader: Any,
        config: TrainConfig,
        recipe: Recipe,
        processes: Processes | None = None,
        cached: Cached | None = None,
    ) -> None:
        self.task, self.loader, self.config, self.recipe = task, loader, config, recipe
        self.processes, self.cached = processes or Processes(), cached
        self.updates = len(loader) // config.grad_accum  # per epoch
        if self.updates < 1:
            raise ConfigError(
                f"{len(loader)} batches do not fill one update of {config.grad_accum}; lower "
                "--batch-size or --grad-accum, or add images"
            )
        self.optimizer, self.scheduler = self._optimizer()
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=config.amp == "fp16")
        if recipe.ema:
            task.setup_ema(decay=recipe.ema, use_warmup=True)
        if config.compile:
            task.split.compile()
            task.compile()
        if self.processes.world > 1:
            devices = [task.device.index or 0] if task.device.type == "cuda" else None
            task.prepare_distributed(devices)
        self.mix = (
            Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=config.num_classes)
            if config.mixup or config.cutmix
            else None
        )

    def _optimizer(self) -> tuple[Any, Any]:
        recipe = self.recipe
        optimizer = optimizer_of(self.task.inner(), recipe)
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
            updates_per_epoch=self.updates,
        )
        assert scheduler is not None
        return optimizer, scheduler

    def run(self, out: Path | None, settings: dict[str, Any], resume: bool = False) -> None:
        """Train to the end.

        Args:
            out: Folder for ``metrics.jsonl`` and ``checkpoints``; None keeps neither.
            settings: Kept in each checkpoint; a resumed run must have the same.
            resume: Continue from the newest good checkpoint.

        Raises:
            ConfigError: If the checkpoint was made with other settings.
            NonFiniteError: If a loss or gradient is not finite.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        root = None if out is None else out / "checkpoints"
        found = checkpoint.latest(root) if resume and root is not None else None
        rng = self._restore(found, settings) if found else None
        step, total = (found.step if found else 0), self.updates * self.recipe.epochs
        every = self.config.save_every or self.updates
        self.task.train()
        with (
            StopSignal() as stop,
            RunLog(out, resume_step=step or None, every=self.config.log_every) as log,
            log.progress("training", total) as bar,
        ):
            bar.advance(step)
            while step < total:
                epoch, skip = divmod(step, self.updates)
                for group in self._groups(epoch, skip, rng):
                    step += 1
                    result = self._update(group, epoch, step, root)
                    if step == 1 or step % self.config.log_every == 0 or step == total:
                        self._log(log, step, result)
                    bar.advance()
                    if root and (step % every == 0 or step == total or stop.requested):
                        self._save(root, step, settings)
                    stop.check()
                rng = None

    def _groups(self, epoch: int, skip: int, rng: Any) -> Iterator[list[Any]]:
        """The batches of each update of an epoch, after ``skip`` updates that are done already."""
        seed = self.config.seed * 1_000_003 + epoch * 1009 + self.processes.rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (timm's augmentations draw from it)
        random.seed(seed)
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        dataset: Any = self.loader.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if getattr(dataset, "views", None):
            dataset.view = epoch % dataset.views
        batches = iter(self.loader)
        size = self.config.grad_accum
        for _ in range(skip * size):
            next(batches)
        if rng is not None and skip:  # an epoch's start has states of its own
            set_rng_state(rng)
        for _ in range(self.updates - skip):
            yield [next(batches) for _ in range(size)]

    def _update(
        self, group: list[Any], epoch: int, step: int, root: Path | None
    ) -> dict[str, Tensor]:
        result = training_step(
            self.task,
            [self._prepared(batch) for batch in group],
            self.optimizer,
            scaler=self.scaler,
            amp={"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.amp),
            clip=self.recipe.clip,
            step=step,
            last_good=root,
        )
        self.scheduler.step_update(num_updates=step)
        self.task.update_ema(step=step)
        if step % self.updates == 0:
            self.scheduler.step(epoch + 1)
        return result

    def _prepared(self, batch: Any) -> Batch:
        """A batch of the loader on the device, mixed, with what the cache holds of the teacher."""
        x, y, indices = on_device(batch, self.task.device, self.config.channels_last)
        if self.mix is not None:
            x, y = self.mix(x, y)
        view = getattr(self.loader.dataset, "view", 0)
        return x, y, None if self.cached is None else self.cached(indices, view)

    def _log(self, log: RunLog, step: int, result: dict[str, Tensor]) -> None:
        shares = self.task.shares(result)
        terms = {n: float(v.detach()) for n, v in result.items() if n != "output"}
        cosines = {f"cosine_{n}": 1 - v / 2 for n, v in terms.items() if n[:3] in ("spa", "ac_")}
        part = {f"share_{name}": round(value, 5) for name, value in shares.items()}
        log.log(step, {**terms, **cosines, **part, "lr": self.optimizer.param_groups[0]["lr"]})
        if step == 1:
            told = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares.items())
            say(f"share of the loss at the first step: {told}")
            for name, value in shares.items():
                if value < SMALL:
                    warn(f"{name} is {100 * value:.2f} % of the loss; check the weights")

    def _save(self, root: Path, step: int, settings: dict[str, Any]) -> None:
        if self.processes.rank or (root / f"step-{step}").exists():
            return
        ema = self.task.inner(ema=True).state_dict() if self.task.has_ema() else None
        tensors, state = training_state(
            self.task.inner(), self.optimizer, ema=ema, scaler=self.scaler.state_dict()
        )
        checkpoint.save(root, step, tensors, state, config=settings)

    def _restore(self, found: checkpoint.Checkpoint, settings: dict[str, Any]) -> Any:
        differ = sorted(k for k, v in settings.items() if found.config.get(k) != v)
        if differ:
            raise ConfigError(
                f"{found.path} was made with other settings ({', '.join(differ)}); resume with "
                "those, or choose another --out"
            )
        extra = restore_training_state(found, self.task.inner(), self.optimizer)
        if extra["ema"] is not None:
            self.task.inner(ema=True).load_state_dict(extra["ema"])
        self.scaler.load_state_dict(extra["scaler"])
        self.scheduler.step_update(num_updates=found.step)
        say(f"resuming after update {found.step}")
        return found.state["rng"]
