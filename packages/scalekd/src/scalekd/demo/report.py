"""The ``demo`` command: a Swin teaches three kinds of small students."""

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from effml_common.cli import dump_config
from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.logging import RunLog, say
from effml_common.report import Report, environment, write_report
from scalekd.config import DemoConfig
from scalekd.demo.data import test_images, training_images
from scalekd.demo.plots import plot
from scalekd.demo.tables import MAIN, Table, claims_of, rows_of
from scalekd.demo.training import (
    DEMO_RATES,
    check_gate,
    train_arm,
    trained_teacher,
)
from scalekd.method.metrics import top1_percent

ARMS = ("alone", "kd", "timm features", "fitnet", "scalekd")


def demo(config: DemoConfig) -> Report:
    """Train every student in every way and write the report.

    Raises:
        InputError: If the device is not there, or the teacher is hardly better than a student alone.
        NonFiniteError: If a training diverges.
    """
    device = resolve_device(config.device)
    started = time.monotonic()
    say(
        "about 2.5 minutes a seed on two quiet CPU cores, 4 MiB of disk; the first run trains the "
        "teacher too, 2 minutes more"
    )
    # Layers this small gain nothing from a second thread.
    torch.set_num_threads(1)
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    teacher, test = trained_teacher(device=device), test_images("drawn")
    best = top1_percent(teacher, test.x, test.y)
    say(f"the teacher has {best:.1f} % on images that no training sees")
    table: dict[tuple[str, str, str], dict[int, float]] = {}
    cells = config.seeds * len(config.students) * len(ARMS)
    with RunLog(out / "run") as log, log.progress("training students", cells) as bar:
        for seed in range(1, config.seeds + 1):
            images = training_images(config.labelled, seed)
            for kind in config.students:
                for arm in ARMS:
                    student = train_arm(
                        arm, kind, teacher, images,
                        epochs=config.epochs, rate=DEMO_RATES[kind], seed=seed,
                    )  # fmt: skip
                    score = top1_percent(student, test.x, test.y)
                    table.setdefault((arm, kind, MAIN), {})[seed] = score
                    log.log(seed, {"arm": arm, "student": kind, "top1": score})
                    bar.advance()
                    if arm == "alone":
                        check_gate(best, score)
    figures = plot(table, out / "run")
    report = report_of(config, table, best, figures, time.monotonic() - started, device)
    atomic_write(out / "run" / "config.yaml", dump_config(config))
    write_report(report, out / "run", figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def report_of(
    config: DemoConfig,
    table: Table,
    best: float,
    figures: Sequence[Path],
    seconds: float,
    device: torch.device,
) -> Report:
    """All that the demo measured; ``best`` is the teacher's accuracy."""
    return Report(
        package="scalekd",
        version=version("scalekd"),
        command=sys.argv,
        seeds=list(range(1, config.seeds + 1)),
        seconds=seconds,
        rows=rows_of(table),
        claims=claims_of(table),
        notes=[
            f"teacher: {best:.1f} %, trained on an unlimited stream; students: {config.labelled} "
            f"labelled images, {config.epochs} epochs, the same rate for all arms of a student",
            "a seed varies labelled images, initial weights and order",
        ],
        files=[path.name for path in figures],
        environment=environment(("timm",), str(device)),
    )
