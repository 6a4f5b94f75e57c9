"""mmengine's iteration loop with our checkpoints: exact resuming, clean stops, metrics.jsonl.

A stop signal (Ctrl-C, SIGTERM) is handled in ``AfDCDTrainLoop.run``, between two iterations.
"""

from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop

from effml_common import checkpoint
from effml_common.checkpoint import rng_state, set_rng_state
from effml_common.errors import CheckpointError
from effml_common.logging import RunLog, say, warn
from effml_common.parsing import one_line
from effml_common.stopping import StopSignal


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
        self.metrics: dict[str, float] = {}  # of the last validation
        self.teacher = getattr(unwrap_model(runner.model), "teacher", None)

    def run(self) -> Any:
        """Train to the end, or to a signal.

        Raises:
            Interrupted: If a signal asked to stop; everything is saved then.
            CheckpointError: If there is nothing usable to resume, or it belongs to another run.
        """
        # Put back what an earlier run saved, and skip the batches that it has seen.
        self._warn_of_other_classes()
        saved = self._restore() if self.resume else None
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self._skip_seen_batches(saved)

        # Iterate. Inside StopSignal a signal only raises a flag, so that no update is cut in two.
        with (
            StopSignal() as stop,
            RunLog(self.run_dir, resume_step=self._iter) as log,
            log.progress("distilling", self._max_iters) as bar,
        ):
            bar.advance(self._iter)
            while self._iter < self._max_iters and not self.stop_training:
                # One update; run_iter counts it.
                self.runner.model.train()
                self.run_iter(next(self.dataloader_iterator))
                log.log(self._iter, self._logged)
                bar.advance()

                # A stop signal is obeyed here: save first, then leave with Interrupted.
                is_last = self._iter == self._max_iters
                if stop.agree() or is_last or self._iter % self.save_every == 0:
                    self._save()
                stop.check()

                self._validate_if_due(is_last)

        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """Make one iteration, and keep what the model logged."""
        # The update itself, between mmengine's hooks.
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs
        )

        self._logged = {
            name: float(torch.as_tensor(value).detach()) for name, value in outputs.items()
        }
        self._iter += 1

    def _skip_seen_batches(self, saved: checkpoint.Checkpoint | None) -> None:
        # The sampler's order is replayed, and the random states are put back after that.
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        if saved is not None and get_world_size() == 1:
            set_rng_state(saved.state["rng"])

    def _validate_if_due(self, is_last: bool) -> None:
        self._decide_current_val_interval()
        due = self._iter >= self.val_begin and self._iter % self.val_interval == 0
        if self.runner.val_loop is not None and (is_last or due):
            # What training draws next must not depend on whether validation ran.
            before = rng_state()
            metrics = self.runner.val_loop.run()
            set_rng_state(before)
            self.metrics = {name: float(value) for name, value in metrics.items()}

    def _save(self) -> None:
        # Weights, and the averaged ones that the EMA hook puts in.
        content = {"state_dict": dict(unwrap_model(self.runner.model).state_dict())}
        self.runner.call_hook("before_save_checkpoint", checkpoint=content)
        tensors = {
            f"{part}/{name}": value
            for part in ("state_dict", "ema_state_dict")
            for name, value in content.get(part, {}).items()
        }

        # Whatever else the next iteration depends on.
        state = {
            "optimizer": self.runner.optim_wrapper.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers()],
            "rng": rng_state(),
        }
        checkpoint.save(self.run_dir / "checkpoints", self._iter, tensors, state)

    def _restore(self) -> checkpoint.Checkpoint | None:
        saved = checkpoint.latest(self.run_dir / "checkpoints")
        if saved is None:
            say("no checkpoint to resume; starting anew")
            return None

        # "state_dict/backbone.weight" is weight "backbone.weight" of part "state_dict".
        content: dict[str, Any] = {}
        for address, value in saved.tensors.items():
            part, _, name = address.partition("/")
            content.setdefault(part, {})[name] = value

        # Put everything back; mmengine counts iterations in the optimizer wrapper as well.
        try:
            self._load_state(content, saved.state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{saved.path} does not fit this run: {one_line(str(error))[:300]}; "
                "resume with the settings it was made with, or choose another --out"
            ) from error
        self._iter = saved.step
        self.runner.optim_wrapper.initialize_count_status(
            self.runner.model, self._iter, self._max_iters
        )
        say(f"resumed after iteration {saved.step}")
        return saved

    def _load_state(self, content: dict[str, Any], state: dict[str, Any]) -> None:
        self.runner._resume = True  # EMAHook asks whether this is a resumed run
        self.runner.call_hook("after_load_checkpoint", checkpoint=content)
        unwrap_model(self.runner.model).load_state_dict(content["state_dict"])
        self.runner.optim_wrapper.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(self._schedulers(), state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)

    def _schedulers(self) -> list[Any]:
        schedulers = self.runner.param_schedulers
        if isinstance(schedulers, dict):
            return [scheduler for group in schedulers.values() for scheduler in group]
        return list(schedulers or [])

    def _warn_of_other_classes(self) -> None:
        metainfo = getattr(self.dataloader.dataset, "metainfo", None) or {}
        data_classes = list(map(str, metainfo.get("classes") or []))
        teacher_classes = list(map(str, getattr(self.teacher, "classes", None) or []))
        if data_classes and teacher_classes and data_classes != teacher_classes:
            warn(
                "the teacher's classes differ in name or order from the data's: "
                f"{', '.join(teacher_classes[:3])} .. against {', '.join(data_classes[:3])} .."
            )


def unwrap_model(model: Any) -> Any:
    """Give the model inside a DDP wrapper, or the model itself."""
    return getattr(model, "module", model)
