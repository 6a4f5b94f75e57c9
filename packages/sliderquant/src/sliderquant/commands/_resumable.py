"""One calibration that survives kill -9: checkpoints after every window, blocks written when final."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from effml_common import checkpoint
from effml_common.cli import dump_config
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, rank, say, warn
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.files import weight_files
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.processes import wait_for_all
from sliderquant.adapters.shards import STAGING
from sliderquant.adapters.simulation import finished_block
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM, StreamedModel
from sliderquant.commands.inspect import Plan
from sliderquant.config import QuantizeConfig, SliderConfig
from sliderquant.method.calibration import WindowResult, activation_format, calibrate
from sliderquant.method.learnables import BlockLearnables

Texts = dict[str, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run works on."""

    config: QuantizeConfig
    opened: StreamedModel
    samples: Tensor
    texts: Texts
    plan: Plan
    learnables: Sequence[BlockLearnables]
    cache: ActivationCache
    out: Path


def _fingerprint(config: QuantizeConfig, samples: Tensor) -> str:
    """Hash what must be the same for a run to be continued."""
    method = {field.name: getattr(config, field.name) for field in fields(SliderConfig)}
    libraries = {name: version(name) for name in ("sliderquant", "torch", "transformers")}
    sha = hashlib.sha256(json.dumps([method, libraries], sort_keys=True).encode())
    sha.update(samples.numpy().tobytes())
    for path in weight_files(config.model):
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def calibrate_saved(job: Job) -> None:
    """Calibrate with a checkpoint after every window, continuing from the last one if there is one."""
    config, decoder, learnables = job.config, job.opened.decoder, job.learnables
    run = job.out / "run"
    checkpoints = run / "checkpoints"
    fingerprint = _fingerprint(config, job.samples)
    done = _restore_(learnables, checkpoints, fingerprint) if checkpoints.is_dir() else 0
    wait_for_all()  # before the first process writes what the others look for
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(config))
    wait_for_all()
    write_block = _block_writer(job, fingerprint)
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", job.plan.updates or decoder.depth) as bar,
    ):
        if done:
            bar.advance(done * job.plan.updates // (job.plan.stages * len(job.plan.windows)))
        clock = _WindowClock(job.plan, done)

        def on_update(loss: float) -> None:
            bar.advance(loss=f"{loss:.3g}")
            stop.check()  # the last finished window is saved

        def on_block(block: int) -> None:
            write_block(block)
            if not job.plan.windows:
                if not job.texts:  # else they are needed once more, to measure the result
                    learnables[block].forget_codes()
                bar.advance()
                stop.check()

        def on_window(result: WindowResult) -> None:
            # Logged first: a resumed run drops lines that no checkpoint covers.
            metrics = {f.name: getattr(result, f.name) for f in fields(WindowResult)}
            log.log(metrics.pop("step"), metrics)
            tensors = {
                f"{block}.{name}": value
                for block, made in enumerate(learnables)
                for name, value in made.state_dict().items()
            }
            checkpoint.save(checkpoints, result.step, tensors, {"fingerprint": fingerprint}, keep=2)
            clock.tell(result)

        calibrate(
            decoder,
            job.samples,
            job.plan.windows,
            learnables,
            config,
            done=done,
            on_update=on_update,
            on_window=on_window,
            on_block=on_block,
            on_experts=_tell_experts(config.min_expert_tokens),
            cache=job.cache,
        )


def _block_writer(job: Job, fingerprint: str) -> Callable[[int], None]:
    """Return what to do with each block when it is final; the last one publishes the model."""
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
        activations=activation_format(config),
        container_bits=config.container_bits,
        identity=fingerprint,
    )

    def write(block: int) -> None:
        finished = finished_block(
            opened.decoder, job.learnables[block], block, config.format != "pre-quant"
        )
        writer.write({f"model.layers.{block}.{name}": value for name, value in finished.items()})
        if block == opened.decoder.depth - 1:
            opened.decoder.hold([])
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


def _tell_experts(minimum: int) -> Callable[[int, Tensor], None]:
    def tell(block: int, counts: Tensor) -> None:
        rare = (counts < minimum).nonzero().flatten().tolist()
        say(f"block {block}: experts received {counts.min()} to {counts.max()} tokens")
        if rare:
            warn(
                f"block {block}: {len(rare)} of {len(counts)} experts received fewer than {minimum} "
                "tokens and are rounded without training; give more text"
            )

    return tell


def _restore_(learnables: Sequence[BlockLearnables], checkpoints: Path, fingerprint: str) -> int:
    """Load the newest intact checkpoint into the learnables; return the finished windows."""
    found = checkpoint.latest(checkpoints)
    if found is None:
        return 0
    if found.state.get("fingerprint") != fingerprint:
        raise InputError(
            f"{checkpoints} belongs to another model, text, setting or library version; "
            "choose another --out or restore what changed"
        )
    for block, made in enumerate(learnables):
        prefix = f"{block}."
        made.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in found.tensors.items()
                if name.startswith(prefix)
            }
        )
    say(f"resuming after {found.step} finished windows")
    return found.step
