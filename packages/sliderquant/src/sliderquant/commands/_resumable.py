"""One calibration that survives kill -9: checkpoints after every window, blocks written when final."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effml_common import checkpoint
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.folders import check_same_settings
from effml_common.logging import Progress, RunLog, rank, say
from effml_common.parsing import dump_config
from effml_common.stopping import StopSignal
from sliderquant.adapters.processes import wait_for_all
from sliderquant.commands._block_writer import block_writer
from sliderquant.commands._job import Job
from sliderquant.commands._run_listener import RunListener, WindowClock
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.parallel import process_count


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

    # Calibrate; the listener writes, saves and tells.
    write_block = block_writer(job, fingerprint)
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", job.plan.steps) as bar,
    ):
        if done:
            bar.advance(done * job.plan.updates // (job.plan.stages * len(job.plan.windows)))
        save = partial(_save_window, job, settings, fingerprint)
        clock = WindowClock(job.plan, done, job.decoder.device)
        listener = RunListener(job, write_block, save, log, bar, stop, clock)
        calibrate(
            job.decoder,
            job.samples,
            job.plan.windows,
            job.learnables,
            job.config,
            done=done,
            on_update=listener.on_update,
            on_window=listener.on_window,
            on_block=listener.on_block,
            on_experts=listener.on_experts,
            on_rounded=listener.on_rounded,
            cache=job.cache,
        )


def write_with_parameters(job: Job) -> None:
    """Write every block with the parameters that its learnables have; nothing is calibrated."""
    # What is there of an interrupted run is not written again.
    settings = {field.name: getattr(job.config, field.name) for field in fields(SliderConfig)}
    write_block = block_writer(job, _fingerprint(job, settings))
    run = job.out / "run"
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(job.config))

    with StopSignal() as stop, Progress("writing blocks", job.decoder.depth) as bar:
        for block in range(job.decoder.depth):
            job.decoder.hold([block])
            write_block(block)
            bar.advance()
            stop.check()
    job.decoder.hold([])


def _save_window(job: Job, settings: dict[str, Any], fingerprint: str, step: int) -> None:
    tensors = {
        f"{block}.{name}": value
        for block, learnables in enumerate(job.learnables)
        for name, value in learnables.trained_by(job.config.method).items()
    }
    folder, state = job.out / "run" / "checkpoints", {"fingerprint": fingerprint}
    checkpoint.save(folder, step, tensors, state, config=settings, keep=2)


def _fingerprint(job: Job, settings: dict[str, Any]) -> str:
    """Hash what must be the same for a run to be continued."""
    libraries = {name: version(name) for name in ("sliderquant", "torch", "transformers")}
    machines = [
        process_count(),
        job.decoder.device.type,
    ]  # sums in another order end in other codes
    sha = hashlib.sha256(json.dumps([settings, libraries, machines], sort_keys=True).encode())
    sha.update(job.samples.numpy().tobytes())
    parameters = [] if job.config.parameters is None else [Path(job.config.parameters)]
    for path in (*job.files, *parameters):
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


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
            f"{checkpoints} belongs to another model, text, setting, library version, kind of device or "
            "number of processes; "
            "choose another --out or restore what changed"
        )

    for block, learned in enumerate(learnables):
        for name, value in learned.trained_by(settings["method"]).items():
            value.copy_(saved.tensors[f"{block}.{name}"])
    say(f"resuming after {saved.step} finished windows")
    return saved.step
