"""The ``demo`` command: a Swin teaches three kinds of small students."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import RunLog, say
from effml_common.parsing import dump_config
from effml_common.report import Report, ReportBuilder
from scalekd.config import DemoConfig
from scalekd.demo.data import Images, test_images, training_images
from scalekd.demo.plots import plot
from scalekd.demo.tables import MAIN_TEACHER, Key, claims_of, rows_of
from scalekd.demo.training import (
    DEMO_RATES,
    check_teacher_lead,
    load_or_train_teacher,
    train_arm,
)
from scalekd.method.metrics import top1_percent

ARMS = ("alone", "kd", "timm features", "fitnet", "scalekd")


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher that is known to be worth learning from.

    Attributes:
        model: In evaluation mode.
        top1: Its accuracy on the test images, in percent.
    """

    model: nn.Module
    top1: float


def demo(config: DemoConfig) -> Report:
    """Train every student in every way and write the report.

    Raises:
        InputError: If the device is not there, or the teacher is hardly better than a student alone.
        NonFiniteError: If a training diverges.
    """
    report = ReportBuilder("scalekd", libraries=("timm",))
    device = resolve_device(config.device)
    say(
        "about 2.5 minutes a seed on two quiet CPU cores, 4 MiB of disk; the first run trains the "
        "teacher too, 2 minutes more"
    )
    # Layers this small gain nothing from a second thread.
    torch.set_num_threads(1)
    run = run_folder(config.out, "demo") / "run"

    # The teacher, judged by images that no training sees.
    test = test_images("drawn")
    model = load_or_train_teacher(device=device)
    teacher = TrainedTeacher(model, top1_percent(model, test.x, test.y))
    say(f"the teacher has {teacher.top1:.1f} % on images that no training sees")

    # Every arm for every student, then what they show.
    table = train_all_arms(config, teacher, test, run)
    atomic_write(run / "config.yaml", dump_config(config))
    return report.write(
        run,
        rows_of(table),
        figures=plot(table, run),
        claims=claims_of(table),
        seeds=list(range(1, config.seeds + 1)),
        device=device,
        notes=[
            f"teacher: {teacher.top1:.1f} %, trained on an unlimited stream; students: "
            f"{config.labelled} labelled images, {config.epochs} epochs, the same rate for all arms "
            "of a student",
            "a seed varies labelled images, initial weights and order",
        ],
    )


def train_all_arms(
    config: DemoConfig, teacher: TrainedTeacher, test: Images, run: Path
) -> dict[Key, dict[int, float]]:
    """Train each student in each way for each seed.

    Args:
        config: Names seeds, students, images and epochs.
        teacher: What they learn from.
        test: What they are judged by.
        run: Folder of ``metrics.jsonl``.

    Returns:
        By arm, kind of student and teacher: top-1 accuracy in percent, by seed.

    Raises:
        InputError: If the teacher is hardly better than a student alone.
        NonFiniteError: If a training diverges.
    """
    table: dict[Key, dict[int, float]] = {}
    trainings = config.seeds * len(config.students) * len(ARMS)
    with RunLog(run) as log, log.progress("training students", trainings) as bar:
        for seed in range(1, config.seeds + 1):
            images = training_images(config.labelled, seed)
            for kind in config.students:
                for arm in ARMS:
                    rate = DEMO_RATES[kind]
                    student = train_arm(
                        arm, kind, teacher.model, images, epochs=config.epochs, rate=rate, seed=seed
                    )
                    top1 = top1_percent(student, test.x, test.y)

                    # A teacher that cannot help is noticed before the other arms have run.
                    table.setdefault((arm, kind, MAIN_TEACHER), {})[seed] = top1
                    log.log(seed, {"arm": arm, "student": kind, "top1": top1})
                    bar.advance()
                    if arm == "alone":
                        check_teacher_lead(teacher.top1, top1)
    return table
