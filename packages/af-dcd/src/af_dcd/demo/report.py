"""The ``demo`` command: one student trained in several ways, at equal steps and at equal time."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch

from af_dcd.config import DemoConfig, PairConfig
from af_dcd.demo.arms import ARMS, FULL, MIMICKING, Arm
from af_dcd.demo.data import draw
from af_dcd.demo.models import SEEDS, Segmenter, demo_teacher, score
from af_dcd.demo.plots import bar_chart, maps_picture
from af_dcd.demo.training import Training, run_arm, step_seconds
from effml_common.device import device_name, resolve_device
from effml_common.errors import InputError
from effml_common.logging import RunLog, say
from effml_common.report import Claim, Report, Row, environment, write_report

SHOWN = ("alone", "KD", "KD + CWD", MIMICKING, FULL)
MATCHED = ("alone", "KD")
GATE = 10.0  # mIoU points that the teacher must be above the student alone
Cells = dict[str, list[dict[str, float]]]


def demo(config: DemoConfig) -> Report:
    """Train, measure and write the report.

    Raises:
        InputError: If the teacher is not clearly better than the student, so that nothing can be told.
        NonFiniteError: If a training diverges.
    """
    began = time.monotonic()
    device = resolve_device(config.device)
    torch.set_num_threads(1)  # layers this small gain nothing from more
    arms = [arm for arm in ARMS if arm.name in SHOWN]
    say("about 4 minutes once for the teacher, then about 2.5 minutes a seed on a quiet core")
    pair = PairConfig(**{f.name: getattr(config, f.name) for f in fields(PairConfig)})
    teacher = demo_teacher(pair, device)
    scenes = draw(pair.scenes, SEEDS["students"]).to(device)
    tests = draw(config.tests, SEEDS["test"]).to(device)
    best = score(teacher, tests)
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    cells: Cells = {}
    students: dict[str, Segmenter] = {}
    matched = matched_steps(arms, pair, teacher, config.steps)
    runs = [(arm.name, arm, config.steps) for arm in arms]
    runs += [(f"{a.name}, equal time", a, matched[a.name]) for a in arms if a.name in MATCHED]
    with RunLog(out / "run") as log, log.progress("arms", len(runs) * config.seeds) as bar:
        for seed in range(1, config.seeds + 1):
            for name, arm, steps in runs:
                training = Training(arm, pair, teacher, scenes, seed, arm.rate, steps)
                done = run_arm(training, tests)
                cells.setdefault(name, []).append(done.metrics)
                students.setdefault(name, done.student)
                log.log(seed, {"arm": name, **done.metrics})
                bar.advance()
            check_gate(best.mean_iou(), cells["alone"])
    (out / "run").mkdir(parents=True, exist_ok=True)
    teacher_row = {"mIoU": best.mean_iou(), "boundary F": best.boundary_f()}
    figures = bar_chart(cells, teacher_row["mIoU"], out / "run" / "arms.png")
    figures += maps_picture(students["alone"], students[FULL], tests, out / "run" / "maps.png")
    report = Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=sys.argv,
        seeds=list(range(1, config.seeds + 1)),
        seconds=time.monotonic() - began,
        rows=[
            Row("teacher", "trained on more labels", {k: [v] for k, v in teacher_row.items()}),
            *rows_of(cells),
        ],
        claims=claims_of(cells),
        notes=notes_of(pair),
        files=[path.name for path in figures],
        environment=environment(("mmsegmentation",), device_name(device)),
    )
    write_report(report, out / "run", figures=figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def matched_steps(
    arms: Sequence[Arm], pair: PairConfig, teacher: Segmenter, steps: int
) -> dict[str, int]:
    """Steps that cheaper arms can make in the time of the full method, by steps timed in turns."""
    scenes = draw(4, SEEDS["students"]).to(next(teacher.parameters()).device)
    timed = [arm for arm in arms if arm.name in (*MATCHED, FULL)]
    trainings = [Training(arm, pair, teacher, scenes, 0, arm.rate, 100) for arm in timed]
    seconds = dict(zip([arm.name for arm in timed], step_seconds(trainings), strict=True))
    return {name: round(steps * seconds[FULL] / seconds[name]) for name in MATCHED}


def check_gate(teacher: float, alone: Sequence[Mapping[str, float]]) -> None:
    """Stop where the teacher has little to teach.

    Raises:
        InputError: If it is not ``GATE`` points above the student alone.
    """
    gap = teacher - sum(cell["mIoU"] for cell in alone) / len(alone)
    if gap < GATE:
        raise InputError(
            f"the teacher is {gap:.1f} points above the student alone, and a comparison needs "
            f"{GATE:g}; give it more --teacher-steps, or the students fewer --scenes"
        )


def rows_of(cells: Cells) -> list[Row]:
    """One row an arm; per-class figures come last."""
    setting = "seed: init, crops and masks"
    return [
        Row(name, setting, {key: [cell[key] for cell in seen] for key in seen[0]})
        for name, seen in cells.items()
    ]


def claims_of(cells: Cells, metric: str = "mIoU") -> list[Claim]:
    """The acceptance rules, those whose arms were run."""
    wanted = [
        ("kd", "logits KD is better than the student alone", "KD", "alone", 0.0),
        ("mimicking", "KD with mimicking is better than KD", MIMICKING, "KD", 0.0),
        ("full", "full Af-DCD is more than 3 points better than alone", FULL, "alone", 3.0),
        ("contrast", "contrast adds to KD with mimicking", FULL, MIMICKING, 0.0),
        ("cwd", "full Af-DCD is better than KD + CWD", FULL, "KD + CWD", 0.0),
        ("spatial", "omni is better than spatial contrast", FULL, f"{MIMICKING} + spatial", 0.0),
        ("channel", "omni is better than channel contrast", FULL, f"{MIMICKING} + channel", 0.0),
        ("time-alone", "full Af-DCD is better than alone at equal time", FULL, "alone, equal time", 0.0),
        ("time-kd", "full Af-DCD is better than KD at equal time", FULL, "KD, equal time", 0.0),
    ]  # fmt: skip
    return [
        Claim(name, text, gaps(cells, ours, theirs, metric, margin))
        for name, text, ours, theirs, margin in wanted
        if ours in cells and theirs in cells
    ]


def gaps(cells: Cells, ours: str, theirs: str, metric: str, margin: float = 0.0) -> list[float]:
    """Paired differences over seeds, less a margin."""
    pairs = zip(cells[ours], cells[theirs], strict=False)
    return [a[metric] - b[metric] - margin for a, b in pairs]


def notes_of(pair: PairConfig) -> list[str]:
    """What a reader must know of the setting."""
    return [
        f"{pair.scenes} labelled scenes for students, {pair.teacher_scenes} for the teacher: its larger "
        "set stands in for pretraining",
        "mIoU and boundary F (outline pixels within 1) in per cent, on whole test scenes",
        "equal time: as many steps as fit into the time of full Af-DCD, by steps timed in turns",
    ]
