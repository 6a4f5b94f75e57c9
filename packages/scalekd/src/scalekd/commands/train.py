"""The ``train`` command: a user's images, a teacher's name, a student's name."""

import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from effml_common.cli import dump_config
from effml_common.errors import ConfigError
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Report, Row, environment, write_report
from scalekd.config import TrainConfig
from scalekd.training.evaluation import accuracy_of
from scalekd.training.preparation import make_trainer, settings_of
from scalekd.training.processes import start_processes
from scalekd.training.recipe import recipe_of
from scalekd.training.runs import write_student


def train(config: TrainConfig) -> Report:
    """Train a student; ``out/student.safetensors`` is what timm loads.

    Raises:
        InputError: If the data, a network or the out folder cannot be used.
        NonFiniteError: If a loss or gradient is not finite.
        Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/train-%Y%m%d-%H%M%S"))
    if (out / "student.safetensors").exists() and config.resume == "never":
        raise ConfigError(f"{out} holds a student already; choose another --out, or --resume auto")
    with ExitStack() as stack:
        device, processes = start_processes(config.device, stack)
        recipe = recipe_of(config)
        trainer = make_trainer(config, recipe, device, processes)
        run = out / "run"
        if processes.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            atomic_write(run / "config.yaml", dump_config(config))
        trainer.run(run, settings_of(config), resume=config.resume == "auto")
        task = trainer.task
        averaged = task.has_ema()
        student = task.export_student(ema=averaged).eval()
        score = accuracy_of(student, config, config.img_size, config.val_split, device)
    report = Report(
        package="scalekd",
        version=version("scalekd"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - started,
        rows=[Row(config.student, f"{recipe.epochs} epochs", {k: [v] for k, v in score.items()})],
        notes=["averaged weights" if averaged else "last weights"],
        files=["student.safetensors"],
        environment=environment(("timm",), str(device)),
    )
    if processes.rank == 0:
        write_student(student, out / "student.safetensors")
        write_report(report, run)
        say(f"student: {out / 'student.safetensors'}")
    return report
