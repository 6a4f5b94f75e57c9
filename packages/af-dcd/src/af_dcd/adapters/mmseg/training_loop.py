"""mmengine's iteration loop with our checkpoints: exact resuming, clean stops, metrics.jsonl."""

from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop

from effml_common import checkpoint
from effml_common.errors import CheckpointError
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, say, warn
from effml_common.parsing import one_line
from effml_common.state import rng_state, set_rng_state


@LOOPS.register_module()
class AfDCDTrainLoop(IterBasedTrainLoop):
    """``IterBasedTrainLoop`` that saves and resumes through ``effml_common.checkpoint``.

    Args:
        runner, dataloader, max_iters, kwargs: Of ``IterBasedTrainLoop``.
        run_dir: Folder of ``checkpoints`` and ``metrics.jsonl``.
        save_every: Iterations between checkpoints.
        resume: Continue from the latest checkpoint there is.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        *,
        run_dir: str,
        save_every: int,
        resume: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(runner, dataloader, max_iters, **kwargs)
        self.run_dir, self.save_every, self.resume = Path(run_dir), save_every, resume
        self.metrics: dict[str, float] = {}
        self.taught = getattr(bare(runner.model), "teacher", None)

    def run(self) -> Any:
        """Train to the end, or to a signal.

        Raises:
            Interrupted: If a signal asked to stop; everything is saved then.
            CheckpointError: If there is nothing usable to resume, or it belongs to another run.
        """
        self._compare_classes()
        found = self._restore() if self.resume else None
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        for _ in range(
            self._iter
        ):  # the sampler's order is replayed, the random states put back after
            next(self.dataloader_iterator)
        if found is not None and get_world_size() == 1:
            set_rng_state(found.state["rng"])
        with (
            StopSignal() as stop,
            RunLog(self.run_dir, resume_step=self._iter) as log,
            log.progress("distilling", self._max_iters) as bar,
        ):
            bar.advance(self._iter)
            while self._iter < self._max_iters and not self.stop_training:
                self.runner.model.train()
                self.run_iter(next(self.dataloader_iterator))
                log.log(self._iter, self._logged)
                bar.advance()
                self._decide_current_val_interval()
                done = self._iter == self._max_iters
                if done or stop.requested or self._iter % self.save_every == 0:
                    self._save()
                stop.check()
                self._validate(done)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """One iteration; keeps what the model logged."""
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs
        )
        self._logged = {
            name: float(torch.as_tensor(value).detach()) for name, value in outputs.items()
        }
        self._iter += 1

    def _validate(self, done: bool) -> None:
        due = self._iter >= self.val_begin and self._iter % self.val_interval == 0
        if self.runner.val_loop is not None and (done or due):
            # What validation draws must not depend on whether it ran.
            before = rng_state()
            metrics = self.runner.val_loop.run()
            set_rng_state(before)
            self.metrics = {name: float(value) for name, value in metrics.items()}

    def _save(self) -> None:
        content = {"state_dict": dict(bare(self.runner.model).state_dict())}
        self.runner.call_hook("before_save_checkpoint", checkpoint=content)  # EMA adds its own
        tensors = {
            f"{part}/{name}": value
            for part in ("state_dict", "ema_state_dict")
            for name, value in content.get(part, {}).items()
        }
        state = {
            "optimizer": self.runner.optim_wrapper.state_dict(),
            "schedulers": [each.state_dict() for each in self._schedulers()],
            "rng": rng_state(),
        }
        checkpoint.save(self.run_dir / "checkpoints", self._iter, tensors, state)

    def _restore(self) -> checkpoint.Checkpoint | None:
        found = checkpoint.latest(self.run_dir / "checkpoints")
        if found is None:
            say("no checkpoint to resume; starting anew")
            return None
        content: dict[str, Any] = {}
        for name, value in found.tensors.items():
            part, _, name = name.partition("/")
            content.setdefault(part, {})[name] = value
        try:
            self.runner._resume = True  # EMAHook asks
            self.runner.call_hook("after_load_checkpoint", checkpoint=content)
            bare(self.runner.model).load_state_dict(content["state_dict"])
            self.runner.optim_wrapper.load_state_dict(found.state["optimizer"])
            schedulers = self._schedulers()
            for each, saved in zip(schedulers, found.state["schedulers"], strict=True):
                each.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{found.path} does not fit this run: {one_line(str(error))[:300]}; "
                "resume with the settings it was made with, or choose another --out"
            ) from error
        self._iter = found.step
        self.runner.optim_wrapper.initialize_count_status(
            self.runner.model, self._iter, self._max_iters
        )
        say(f"resumed after iteration {found.step}")
        return found

    def _schedulers(self) -> list[Any]:
        found = self.runner.param_schedulers
        if isinstance(found, dict):
            return [each for group in found.values() for each in group]
        return list(found or [])

    def _compare_classes(self) -> None:
        ours = (getattr(self.dataloader.dataset, "metainfo", None) or {}).get("classes")
        theirs = getattr(self.taught, "classes", None)
        if ours and theirs and list(map(str, ours)) != list(map(str, theirs)):
            warn(
                "the teacher's classes differ in name or order from the data's: "
                f"{', '.join(map(str, theirs[:3]))} .. against {', '.join(map(str, ours[:3]))} .."
            )


def bare(model: Any) -> Any:
    """The model inside a DDP wrapper."""
    return getattr(model, "module", model)
