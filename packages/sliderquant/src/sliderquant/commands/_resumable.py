"""One calibration that survives kill -9: checkpoints after every window, blocks written when final."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from effml_common import checkpoint
from effml_common.cli import dump_config
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.interrupt import StopSignal
from effml_common.logging import Progress, RunLog, rank, say, warn
from effml_common.resume import check_same_settings
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.processes import wait_for_all
from sliderquant.adapters.shards import STAGING
from sliderquant.adapters.simulation import finished_block
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM
from sliderquant.commands._job import Job
from sliderquant.commands.inspect import Plan
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import WindowResult, calibrate
from sliderquant.method.learnables import BlockLearnables


def calibrate_saved(job: Job) -> None:
    """Calibrate with a checkpoint after every window, continuing from the last one if there is one."""
    # Continue where an earlier process of the same run stopped.
    run = job.out / "run"
    settings = {field.name: getattr(job.config, field.name) for field in fields(SliderConfig)}
    fingerprint = _fingerprint(job, settings)
    done = _restore_(job.learnables, run / "checkpoints", settings, fingerprint)
    wait_for_all()  # before the first process writes what the others look for
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(job.config))
    wait_for_all()

    # Calibrate; the hooks write, save and tell.
    write_block = _block_writer(job, fingerprint)
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", job.plan.updates or job.decoder.depth) as bar,
    ):
        if done:
            bar.advance(done * job.plan.updates // (job.plan.stages * len(job.plan.windows)))
        save = partial(_save_window, job, settings, fingerprint)
        hooks = _Hooks(job, write_block, save, log, bar, stop, _WindowClock(job.plan, done))
        calibrate(
            job.decoder,
            job.samples,
            job.plan.windows,
            job.learnables,
            job.config,
            done=done,
            on_update=hooks.on_update,
            on_window=hooks.on_window,
            on_block=hooks.on_block,
            on_experts=hooks.on_experts,
            cache=job.cache,
        )


class _Hooks:
    """What is done whenever an update, a window or a block is finished."""

    def __init__(
        self,
        job: Job,
        write_block: Callable[[int], None],
        save_window: Callable[[int], None],
        log: RunLog,
        bar: Progress,
        stop: StopSignal,
        clock: "_WindowClock",
    ) -> None:
        self._job, self._write_block, self._save_window = job, write_block, save_window
        self._log, self._bar, self._stop, self._clock = log, bar, stop, clock

    def on_update(self, loss: float) -> None:
        """Advance the bar; stop if asked, because the last finished window is saved."""
        self._bar.advance(loss=f"{loss:.3g}")
        self._stop.check()

    def on_block(self, block: int) -> None:
        """Write a final block."""
        self._write_block(block)
        if self._job.plan.windows:
            return

        # Compensated rounding has no updates to count; its codes are needed once more to measure.
        if not self._job.texts:
            self._job.learnables[block].forget_codes()
        self._bar.advance()
        self._stop.check()

    def on_window(self, result: WindowResult) -> None:
        """Save a finished window."""
        # Logged first: a resumed run drops lines that no checkpoint covers.
        metrics = asdict(result)
        self._log.log(metrics.pop("step"), metrics)
        self._save_window(result.step)
        self._clock.tell(result)

    def on_experts(self, block: int, counts: Tensor) -> None:
        """Say how many tokens each expert received."""
        least = self._job.config.min_expert_tokens
        rare = int((counts < least).sum())
        say(f"block {block}: experts received {counts.min()} to {counts.max()} tokens")
        if rare:
            warn(
                f"block {block}: {rare} of {len(counts)} experts received fewer than {least} "
                "tokens and are rounded without training; give more text"
            )


def _save_window(job: Job, settings: dict[str, Any], fingerprint: str, step: int) -> None:
    tensors = {
        f"{block}.{name}": value
        for block, learnables in enumerate(job.learnables)
        for name, value in learnables.state_dict().items()
    }
    folder, state = job.out / "run" / "checkpoints", {"fingerprint": fingerprint}
    checkpoint.save(folder, step, tensors, state, config=settings, keep=2)


def _fingerprint(job: Job, settings: dict[str, Any]) -> str:
    """Hash what must be the same for a run to be continued."""
    libraries = {name: version(name) for name in ("sliderquant", "torch", "transformers")}
    sha = hashlib.sha256(json.dumps([settings, libraries], sort_keys=True).encode())
    sha.update(job.samples.numpy().tobytes())
    for path in job.files:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _block_writer(job: Job, fingerprint: str) -> Callable[[int], None]:
    """Return what to do with each block when it is final; the last one publishes the model."""
    # One process writes, and what an earlier one published is not written again.
    config, opened = job.config, job.opened
    if rank() > 0:
        return lambda block: None
    for stale in job.out.glob(".*.tmp"):  # a kill in the middle of a small file
        stale.unlink()
    if (job.out / "config.json").exists():  # it was published before the run was stopped
        shutil.rmtree(job.out / STAGING, ignore_errors=True)
        return lambda block: None

    untied = config.rotate in ("r1", "both")
    writer = ModelWriter(
        job.out,
        config.model,
        format=config.format,
        dtype=opened.dtype,
        config_changes={"tie_word_embeddings": False} if untied else None,
        activations=job.activations,
        container_bits=config.container_bits,
        identity=fingerprint,
    )

    def write(block: int) -> None:
        finished = finished_block(
            job.decoder, job.learnables[block], block, config.format != "pre-quant"
        )
        writer.write({f"model.layers.{block}.{name}": value for name, value in finished.items()})
        if block == job.decoder.depth - 1:
            job.decoder.hold([])
            for name in (EMBEDDING, NORM, HEAD):
                writer.write({name: opened.source.outside_tensor(name).to(opened.dtype)})
            writer.publish()

    return write


class _WindowClock:
    """Says how long each window took and how much time is left."""

    def __init__(self, plan: Plan, done: int) -> None:
        self._total = plan.stages * len(plan.windows)
        self._left = plan.stages * plan.block_visits
        self._skipped = done
        self._visited = 0
        self._start = self._last = time.monotonic()

    def tell(self, result: WindowResult) -> None:
        """Print one line for a finished window."""
        now = time.monotonic()
        self._visited += len(result.window)
        share = self._visited / (self._visited + self._remaining(result))
        left = (now - self._start) * (1 - share) / share
        blocks = "-".join(map(str, sorted({result.window[0], result.window[-1]})))
        say(
            f"window {result.step}/{self._total} (blocks {blocks}, ratio {result.ratio:g}): "
            f"{now - self._last:.1f} s, loss {result.first_loss:.3g} -> {result.last_loss:.3g}, "
            f"about {left:.0f} s left"
        )
        self._last = now

    def _remaining(self, result: WindowResult) -> float:
        # Windows differ in size; the average is near enough.
        return self._left / self._total * (self._total - result.step)


def _restore_(
    learnables: Sequence[BlockLearnables],
    checkpoints: Path,
    settings: dict[str, Any],
    fingerprint: str,
) -> int:
    """Load the newest intact checkpoint into the learnables; return the finished windows."""
    saved = checkpoint.latest(checkpoints) if checkpoints.is_dir() else None
    if saved is None:
        return 0

    # The same run: same settings, and the same model, text and libraries.
    check_same_settings(saved.config or settings, settings, place=checkpoints)
    if saved.state.get("fingerprint") != fingerprint:
        raise InputError(
            f"{checkpoints} belongs to another model, text, setting or library version; "
            "choose another --out or restore what changed"
        )

    for block, learned in enumerate(learnables):
        prefix = f"{block}."
        learned.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in saved.tensors.items()
                if name.startswith(prefix)
            }
        )
    say(f"resuming after {saved.step} finished windows")
    return saved.step
