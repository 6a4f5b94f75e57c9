"""One calibration that survives kill -9: checkpoints after every window, blocks written when final."""

from functools import partial
from pathlib import Path

from effml_common import checkpoint
from effml_common.files import atomic_write
from effml_common.logging import Progress, RunLog, rank, say
from effml_common.parsing import dump_config
from effml_common.stopping import StopSignal
from sliderquant.adapters.processes import wait_for_all
from sliderquant.commands._block_writer import block_writer
from sliderquant.commands._job import Job
from sliderquant.commands._run_listener import RunListener, WindowClock
from sliderquant.method.calibration import calibrate


def calibrate_saved(job: Job) -> None:
    """Calibrate with a checkpoint after every window, continuing from the last one if there is one."""
    # Continue where an earlier process of the same run stopped.
    run = job.out / "run"
    done = _restore_(job, run / "checkpoints")
    wait_for_all()  # before the first process writes what the others look for
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(job.config))
    wait_for_all()

    # Calibrate; the listener writes, saves and tells.
    write_block = block_writer(job)
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", job.plan.steps) as bar,
    ):
        if done:
            bar.advance(done * job.plan.updates // (job.plan.stages * len(job.plan.windows)))
        save = partial(_save_window, job)
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
            on_rare_experts=listener.on_rare_experts,
            cache=job.cache,
        )


def write_with_parameters(job: Job) -> None:
    """Write every block with the parameters that its learnables have; nothing is calibrated."""
    write_block = block_writer(job)
    run = job.out / "run"
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(job.config))

    # What is there of an interrupted run is not written again.
    with StopSignal() as stop, Progress("writing blocks", job.decoder.depth) as bar:
        for block in range(job.decoder.depth):
            job.decoder.hold([block])
            write_block(block)
            bar.advance()
            stop.agree()
            stop.check()
    job.decoder.hold([])


def _save_window(job: Job, step: int) -> None:
    tensors = {
        f"{block}.{name}": value
        for block, learnables in enumerate(job.learnables)
        for name, value in learnables.trained_by(job.config.method).items()
    }
    checkpoint.save(job.out / "run" / "checkpoints", step, tensors, {}, keep=2)


def _restore_(job: Job, checkpoints: Path) -> int:
    """Load the newest intact checkpoint into the learnables; return the finished windows."""
    saved = checkpoint.latest(checkpoints) if checkpoints.is_dir() else None
    if saved is None:
        return 0
    for block, learned in enumerate(job.learnables):
        for name, value in learned.trained_by(job.config.method).items():
            value.copy_(saved.tensors[f"{block}.{name}"])
    say(f"resuming after {saved.step} finished windows")
    return saved.step
