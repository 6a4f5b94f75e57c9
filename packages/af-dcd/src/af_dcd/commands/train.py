"""The ``train`` command: a mmsegmentation pair through mmengine's Runner."""

import shutil
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from af_dcd.config import TrainConfig
from effml_common.device import device_name, resolve_device
from effml_common.errors import CheckpointError, ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import rank, say
from effml_common.parsing import dump_config
from effml_common.report import Report, Row, environment, write_report

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

LIBRARIES = ("mmsegmentation", "mmengine", "mmcv-lite", "mmcv")


def train(config: TrainConfig) -> Report:
    """Distil, and write the plain student.

    Raises:
        InputError: If configs, weights or data do not fit together.
        NonFiniteError: If a loss or a gradient becomes NaN or infinite.
        Interrupted: If a signal stopped it; everything is saved.
    """
    began = time.monotonic()
    device = resolve_device(config.device)
    from af_dcd.adapters.mmseg import config_builder
    from af_dcd.adapters.mmseg import runner as running

    out = Path(config.out or time.strftime("runs/train-%Y%m%d-%H%M%S"))
    run_dir = out / "run"
    whole = config_builder.compose(config, run_dir)
    running.check_device(whole, device)
    if config.dry_run:
        from af_dcd.adapters.mmseg.summary import dry_run

        return report_of(config, device, began, dry_run(whole, device))
    fresh = not out.exists()
    _claim(out, config)
    try:
        runner = running.make_runner(whole, device)
    except InputError:
        if fresh:  # mmengine opens its log before it looks at the models
            shutil.rmtree(out, ignore_errors=True)
        raise
    if config.student_init is not None:
        running.start_from(runner, config.student_init)
    if rank() == 0:
        atomic_write(run_dir / "config.yaml", dump_config(config))
        atomic_write(run_dir / "student.py", config_builder.student_of(whole).pretty_text)
    say(estimate(whole))
    running.train(runner)
    loop: Any = runner.train_loop
    running.save_student(runner, out / "student.pth")
    if rank() == 0:
        atomic_write(out / "student.py", config_builder.student_of(whole).pretty_text)
    metrics = {name: [value] for name, value in loop.metrics.items()}
    row = Row("student", f"seed {config.seed}", {**metrics, "iterations": [float(loop.iter)]})
    report = report_of(config, device, began, [row], running.facts(runner, device))
    write_report(report, run_dir)
    return report


def report_of(
    config: TrainConfig,
    device: "torch.device",
    began: float,
    rows: list[Row],
    notes: tuple[str, ...] = (),
) -> Report:
    """The report of a run."""
    return Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - began,
        rows=rows,
        notes=notes,
        files=[] if config.dry_run else ["student.pth", "student.py"],
        environment=environment(LIBRARIES, device_name(device)),
    )


def estimate(whole: "Config") -> str:
    """What the run is going to take, as far as it can be told before the first step."""
    batch = whole.train_dataloader.get("batch_size", 1)
    return (
        f"{whole.train_cfg.max_iters} iterations of {batch} crops; the time left appears beside the "
        "progress after the first of them (af-dcd inspect tells the cost of a step)"
    )


def _claim(out: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds another run, and one whose run had other settings."""
    kept = out / "run" / "config.yaml"
    if config.resume == "never":
        if (out / "run" / "checkpoints").exists() or (out / "student.pth").exists():
            raise InputError(f"{out} holds a run; choose another --out, or add --resume auto")
    elif kept.is_file():
        from effml_common.parsing import parse

        earlier = parse(TrainConfig, ["--config", str(kept)], prog="af-dcd train")
        free = {"resume", "save_every", "out", "launcher", "device"}
        for field in fields(TrainConfig):
            old, new = getattr(earlier, field.name), getattr(config, field.name)
            if field.name not in free and old != new:
                raise CheckpointError(
                    f"{out} was made with {field.name} {old}, not {new}; "
                    "resume with the same settings, or choose another --out"
                )
    try:
        (out / "run").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be made: {error.strerror}; choose another --out"
        ) from error
