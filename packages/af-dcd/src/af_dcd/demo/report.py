"""The ``demo`` command: one student trained in several ways, at equal steps and at equal time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from af_dcd.config import DemoConfig, PairConfig
from af_dcd.demo.arms import ARMS, FULL, MIMICKING, Arm
from af_dcd.demo.data import Scenes, draw_scenes
from af_dcd.demo.models import SCENE_SEEDS, Segmenter, demo_teacher, score_segmenter
from af_dcd.demo.plots import draw_bar_chart, draw_label_maps
from af_dcd.demo.training import LabelledPair, Training, median_step_seconds, run_training
from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.folders import run_folder
from effml_common.logging import RunLog, say
from effml_common.report import Claim, Report, ReportBuilder, Row

SHOWN_ARMS = ("alone", "KD", "KD + CWD", MIMICKING, FULL)
EQUAL_TIME_ARMS = ("alone", "KD")  # get the time of the full method, too
LEAST_TEACHER_LEAD = 10.0  # mIoU points above the student alone
TIMED_STEPS = 100  # of the schedule that timed steps pretend to follow

Cells = dict[str, list[dict[str, float]]]  # by arm, the metrics of each seed


@dataclass(frozen=True)
class ArmRun:
    """One row of the comparison: an arm and its number of updates."""

    name: str
    arm: Arm
    steps: int


@dataclass(frozen=True)
class Setting:
    """What is the same for all arms, on the device where everything computes."""

    pair: LabelledPair
    tests: Scenes
    teacher_metrics: dict[str, float]
    runs: list[ArmRun]


@dataclass(frozen=True)
class Comparison:
    """Metrics of every run and seed, and the first seed's students for pictures."""

    cells: Cells = field(default_factory=dict)
    students: dict[str, Segmenter] = field(default_factory=dict)


def demo(config: DemoConfig) -> Report:
    """Train, measure and write the report.

    Raises:
        InputError: If the teacher is not clearly better than the student, so that nothing can be told.
        NonFiniteError: If a training diverges.
    """
    builder = ReportBuilder("af-dcd", ("mmsegmentation",))
    device = resolve_device(config.device)
    torch.set_num_threads(1)  # layers this small gain nothing from more
    say("about 4 minutes once for the teacher, then about 2.5 minutes a seed on a quiet core")

    # The teacher and the scenes, then every arm on every seed.
    run_dir = run_folder(config.out, "demo") / "run"
    setting = prepare_setting(config, device)
    comparison = run_arms(setting, config.seeds, run_dir)

    # Pictures and the report.
    cells, students = comparison.cells, comparison.students
    teacher_miou = setting.teacher_metrics["mIoU"]
    figures = draw_bar_chart(cells, teacher_miou, run_dir / "arms.png")
    figures += draw_label_maps(
        students["alone"], students[FULL], setting.tests, run_dir / "maps.png"
    )
    teacher_values = {name: [value] for name, value in setting.teacher_metrics.items()}
    return builder.write(
        run_dir,
        [Row("teacher", "trained on more labels", teacher_values), *arm_rows(cells)],
        figures=figures,
        seeds=list(range(1, config.seeds + 1)),
        claims=acceptance_claims(cells),
        notes=setting_notes(setting.pair.config),
        device=device,
    )


def prepare_setting(config: DemoConfig, device: torch.device) -> Setting:
    """Get the teacher, draw the scenes, and find how many steps each arm makes.

    Raises:
        NonFiniteError: If the teacher's training diverges.
    """
    # Students see few labelled scenes, the teacher has seen many.
    pair_config = PairConfig(**{f.name: getattr(config, f.name) for f in fields(PairConfig)})
    teacher = demo_teacher(pair_config, device)
    scenes = draw_scenes(pair_config.scenes, SCENE_SEEDS["students"]).to(device)
    pair = LabelledPair(pair_config, teacher, scenes)
    tests = draw_scenes(config.tests, SCENE_SEEDS["test"]).to(device)
    scores = score_segmenter(teacher, tests)

    # Every arm at equal steps, and the cheap ones again at equal time.
    arms = [arm for arm in ARMS if arm.name in SHOWN_ARMS]
    steps = equal_time_steps(arms, pair, config.steps)
    runs = [ArmRun(arm.name, arm, config.steps) for arm in arms]
    runs += [
        ArmRun(f"{arm.name}, equal time", arm, steps[arm.name])
        for arm in arms
        if arm.name in EQUAL_TIME_ARMS
    ]
    metrics = {"mIoU": scores.mean_iou(), "boundary F": scores.boundary_f()}
    return Setting(pair, tests, metrics, runs)


def equal_time_steps(arms: Sequence[Arm], pair: LabelledPair, steps: int) -> dict[str, int]:
    """Count the steps that cheaper arms can make in the time of ``steps`` of the full method."""
    scenes = draw_scenes(4, SCENE_SEEDS["students"]).to(pair.scenes.images.device)
    timed_pair = LabelledPair(pair.config, pair.teacher, scenes)
    timed_arms = [arm for arm in arms if arm.name in (*EQUAL_TIME_ARMS, FULL)]
    trainings = [Training(arm, timed_pair, 0, TIMED_STEPS) for arm in timed_arms]
    names = [arm.name for arm in timed_arms]
    seconds = dict(zip(names, median_step_seconds(trainings), strict=True))
    return {name: round(steps * seconds[FULL] / seconds[name]) for name in EQUAL_TIME_ARMS}


def run_arms(setting: Setting, seeds: int, run_dir: Path) -> Comparison:
    """Train every arm on every seed; metrics go to ``metrics.jsonl`` as they come.

    Raises:
        InputError: After a seed, if the teacher does not lead the student alone.
        NonFiniteError: If a training diverges.
    """
    comparison, runs = Comparison(), setting.runs
    with RunLog(run_dir) as log, log.progress("arms", len(runs) * seeds) as bar:
        for seed in range(1, seeds + 1):
            for run in runs:
                training = Training(run.arm, setting.pair, seed, run.steps)
                result = run_training(training, setting.tests)
                comparison.cells.setdefault(run.name, []).append(result.metrics)
                comparison.students.setdefault(run.name, result.student)
                log.log(seed, {"arm": run.name, **result.metrics})
                bar.advance()

            # Without a teacher that knows more there is nothing to compare.
            check_teacher_leads(setting.teacher_metrics["mIoU"], comparison.cells["alone"])
    return comparison


def check_teacher_leads(teacher_miou: float, alone: Sequence[Mapping[str, float]]) -> None:
    """Stop where the teacher has little to teach.

    Raises:
        InputError: If it is not ``LEAST_TEACHER_LEAD`` points above the student alone.
    """
    lead = teacher_miou - sum(metrics["mIoU"] for metrics in alone) / len(alone)
    if lead < LEAST_TEACHER_LEAD:
        raise InputError(
            f"the teacher is {lead:.1f} points above the student alone, and a comparison needs "
            f"{LEAST_TEACHER_LEAD:g}; give it more --teacher-steps, or the students fewer --scenes"
        )


def arm_rows(cells: Cells) -> list[Row]:
    """Make one row for each arm; per-class figures come last."""
    setting = "seed: init, crops and masks"
    return [
        Row(name, setting, {key: [metrics[key] for metrics in runs] for key in runs[0]})
        for name, runs in cells.items()
    ]


def acceptance_claims(cells: Cells, metric: str = "mIoU") -> list[Claim]:
    """Judge the acceptance rules, those whose arms were run."""
    # Name, sentence, the arm it speaks for, the arm beside it, and the margin in points.
    rules = [
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

    # Gaps are paired by seed.
    return [
        Claim(name, text, paired_gaps(cells, better, worse, metric, margin))
        for name, text, better, worse, margin in rules
        if better in cells and worse in cells
    ]


def paired_gaps(
    cells: Cells, better: str, worse: str, metric: str, margin: float = 0.0
) -> list[float]:
    """Subtract one arm from another seed by seed, less a margin."""
    pairs = zip(cells[better], cells[worse], strict=False)
    return [a[metric] - b[metric] - margin for a, b in pairs]


def setting_notes(pair: PairConfig) -> list[str]:
    """Say what a reader must know of the setting."""
    return [
        f"{pair.scenes} labelled scenes for students, {pair.teacher_scenes} for the teacher: its larger "
        "set stands in for pretraining",
        "mIoU and boundary F (outline pixels within 1) in per cent, on whole test scenes",
        "equal time: as many steps as fit into the time of full Af-DCD, by steps timed in turns",
    ]
