"""Ways to distil a small segmenter on drawn scenes, and what the contrast costs at Cityscapes' shape.

Phases, each resumable cell by cell: ``rates`` tries two learning rates for every arm on development
scenes, with two seeds since one decides little; ``arms`` trains every arm at its better rate on three
seeds; ``time`` gives alone and KD as many steps as fit into the time of the full method; ``variants``
changes one setting of the full method at a time, on development scenes, and ``confirm`` trains the best
of these on the three seeds; ``cost`` measures the contrast, chunked against naive. ``--report`` only
writes the results of the cells there are.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save

from af_dcd.commands.bench import bench
from af_dcd.config import BenchConfig, PairConfig
from af_dcd.demo.arms import ARMS, FULL, MIMICKING, Arm
from af_dcd.demo.data import draw_scenes
from af_dcd.demo.models import SCENE_SEEDS, Segmenter, demo_teacher, score_segmenter
from af_dcd.demo.plots import draw_bar_chart, draw_label_maps
from af_dcd.demo.report import (
    EQUAL_TIME_ARMS,
    acceptance_claims,
    arm_rows,
    equal_time_steps,
    setting_notes,
)
from af_dcd.demo.training import LabelledPair, Training, run_training
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import Claim, Report, Row, environment, write_report

PROG = "python -m benchmarks.af_dcd.study"
EXAMPLES = (PROG, f"{PROG} --phases cost", f"{PROG} --report")
Phase = Literal["rates", "arms", "time", "variants", "confirm", "cost"]
CENTRAL_ARMS = ("alone", "KD", MIMICKING, FULL)
RATES = (3e-3, 8e-3)
DEVELOPMENT_SEED = 100  # of what is varied
TUNING_SEEDS = (DEVELOPMENT_SEED, 101)  # of what is tuned
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "weight / 4": ({"lambda_ctr": 1.25e-3}, {}),
    "weight x 4": ({"lambda_ctr": 2e-2}, {}),
    "temperature 0.07": ({"tau": 0.07}, {}),
    "temperature 2": ({"tau": 2.0}, {}),
    "patch 2": ({"patch": 2}, {}),
    "patch 8": ({"patch": 8}, {}),
    "groups 4": ({"groups": 4}, {}),
    "groups 16": ({"groups": 16}, {}),
    "no pooling": ({"pool": 1}, {}),
    "L2": ({"p": 2}, {}),
    "all negatives": ({"negatives": "all"}, {}),
    "L2, all negatives": ({"p": 2, "negatives": "all"}, {}),
    "no mask": ({"mask_ratio": 0.0}, {}),
    "narrow generator": ({"hidden": 24}, {}),
    "6 scenes": ({}, {"scenes": 6}),
    "48 scenes": ({}, {"scenes": 48}),
    "weaker teacher": ({}, {"teacher_steps": 400}),
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare ways to distil, and measure the contrast."""

    phases: tuple[Phase, ...] = field(default=get_args(Phase), metadata={"help": "in order"})
    steps: int = field(default=500, metadata={"help": "updates of a student"})
    seeds: int = field(default=3, metadata={"help": "seeds of the confirming runs"})
    tests: int = field(default=80, metadata={"help": "scenes for measuring"})
    device: str = field(default="cpu", metadata={"help": "of the cost phase"})
    cells: str = field(default="runs/af-dcd", metadata={"help": "folder of the cells"})
    out: str = field(
        default="benchmarks/af_dcd/results", metadata={"help": "folder of the results"}
    )
    report: bool = field(default=False, metadata={"help": "only write the report"})


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(StudyConfig, words, prog=PROG, examples=EXAMPLES)
    folder = Path(config.cells) / f"{config.steps}-steps"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not config.report:
        run: dict[Phase, Callable[[StudyConfig, Path], None]] = {
            "rates": try_rates, "arms": train_arms, "time": train_for_equal_time,
            "variants": train_variants, "confirm": confirm_best_variant, "cost": measure_cost,
        }  # fmt: skip
        for phase in config.phases:
            run[phase](config, folder)
    write_results(config, folder)


def cell_path(folder: Path, name: str, seed: int) -> Path:
    """Where a cell is kept."""
    return folder / f"{name.replace(' ', '_').replace('/', '-')}-{seed}.json"


@dataclass(frozen=True)
class Cell:
    """One training: what is trained, where, and on which scenes it is measured."""

    name: str
    arm: Arm
    seed: int
    steps: int
    pair: PairConfig = field(default_factory=PairConfig)
    scenes: str = "test"


def run_cell(config: StudyConfig, folder: Path, cell: Cell) -> None:
    """Train a cell, unless one of the same rate is kept."""
    path = cell_path(folder, cell.name, cell.seed)
    if path.exists() and json.loads(path.read_text())["rate"] == cell.arm.rate:
        return

    # Train and measure.
    scenes = draw_scenes(cell.pair.scenes, SCENE_SEEDS["students"])
    pair = LabelledPair(cell.pair, demo_teacher(cell.pair), scenes)
    training = Training(cell.arm, pair, cell.seed, cell.steps)
    result = run_training(training, draw_scenes(config.tests, SCENE_SEEDS[cell.scenes]))

    # Keep the figures, and the first seed's weights for pictures.
    content = {"name": cell.name, "seed": cell.seed, "rate": cell.arm.rate, **result.metrics}
    atomic_write(path, json.dumps(content) + "\n")
    if cell.seed == 1:
        weights = {k: v.contiguous() for k, v in result.student.state_dict().items()}
        atomic_write(path.with_suffix(".safetensors"), save(weights))
    shown = {k: round(result.metrics[k], 2) for k in ("mIoU", "boundary F", "seconds")}
    print(cell.name, cell.seed, shown, flush=True)


def try_rates(config: StudyConfig, folder: Path) -> None:
    for arm in ARMS:
        for rate in RATES:
            for seed in TUNING_SEEDS:
                name, rated = f"rate {rate:g} {arm.name}", replace(arm, rate=rate)
                cell = Cell(name, rated, seed, config.steps, scenes="development")
                run_cell(config, folder, cell)


def at_better_rate(folder: Path, arm: Arm) -> Arm:
    """The arm at the rate that was better on development scenes."""
    sums = {}
    for rate in RATES:
        paths = [cell_path(folder, f"rate {rate:g} {arm.name}", seed) for seed in TUNING_SEEDS]
        if all(path.exists() for path in paths):
            sums[rate] = sum(json.loads(path.read_text())["mIoU"] for path in paths)
    # Half a comparison chooses nothing: then the rate that was better for those that were compared.
    return replace(arm, rate=max(sums, key=lambda r: sums[r])) if len(sums) == len(RATES) else arm


def train_arms(config: StudyConfig, folder: Path) -> None:
    """What the main claims need first, on all seeds, then the other arms."""
    for central in (True, False):
        for seed in range(1, config.seeds + 1):
            for arm in ARMS:
                if (arm.name in CENTRAL_ARMS) is central:
                    rated = at_better_rate(folder, arm)
                    run_cell(config, folder, Cell(f"arm {arm.name}", rated, seed, config.steps))


def train_for_equal_time(config: StudyConfig, folder: Path) -> None:
    path = folder / "matched.json"
    if not path.exists():
        pair_config = PairConfig()
        scenes = draw_scenes(pair_config.scenes, SCENE_SEEDS["students"])
        pair = LabelledPair(pair_config, demo_teacher(pair_config), scenes)
        atomic_write(path, json.dumps(equal_time_steps(ARMS, pair, config.steps)) + "\n")
    steps = json.loads(path.read_text())
    print("steps at equal time", steps, flush=True)

    for seed in range(1, config.seeds + 1):
        for arm in ARMS:
            if arm.name in EQUAL_TIME_ARMS:
                rated, name = at_better_rate(folder, arm), f"arm {arm.name}, equal time"
                run_cell(config, folder, Cell(name, rated, seed, steps[arm.name]))


def train_variants(config: StudyConfig, folder: Path) -> None:
    for name, (method, pair) in VARIANTS.items():
        for arm in ARMS:
            # A change of the setting, not of the method, needs mimicking without contrast beside it.
            wanted = (FULL, MIMICKING) if pair or "mask_ratio" in method else (FULL,)
            if arm.name in wanted:
                rated = at_better_rate(folder, arm)
                changed = replace(rated, method={**arm.method, **method})
                cell = Cell(
                    f"variant {name}: {arm.name}", changed, DEVELOPMENT_SEED, config.steps,
                    PairConfig(**pair), "development",
                )  # fmt: skip
                run_cell(config, folder, cell)


def best_variant(folder: Path) -> str | None:
    """The change of the method, on the study's own scenes and teacher, with the highest mIoU."""
    miou = {}
    for name, (_, pair) in VARIANTS.items():
        path = cell_path(folder, f"variant {name}: {FULL}", DEVELOPMENT_SEED)
        if not pair and path.exists():
            miou[name] = json.loads(path.read_text())["mIoU"]
    return max(miou, key=lambda name: miou[name]) if miou else None


def confirm_best_variant(config: StudyConfig, folder: Path) -> None:
    name = best_variant(folder)
    if name is None:
        return
    arm = next(arm for arm in ARMS if arm.name == FULL)
    rated = at_better_rate(folder, arm)
    changed = replace(rated, method={**arm.method, **VARIANTS[name][0]})
    for seed in range(1, config.seeds + 1):
        run_cell(config, folder, Cell(f"arm {FULL}, {name}", changed, seed, config.steps))


def measure_cost(config: StudyConfig, folder: Path) -> None:
    path = folder.parent / f"cost-cityscapes-{config.device}.json"
    if not path.exists():
        bench_out = str(folder.parent / "bench")
        settings = BenchConfig(device=config.device, repeats=3, out=bench_out)
        atomic_write(path, json.dumps(bench(settings).to_json(), indent=1) + "\n")


def write_results(config: StudyConfig, folder: Path) -> None:
    """Collect the cells there are, and write figures and report."""
    out = Path(config.out)
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    kept = [cell for cell in kept if "mIoU" in cell]
    names = [f"arm {arm.name}" for arm in ARMS]
    names += [f"arm {name}, equal time" for name in EQUAL_TIME_ARMS]
    names.append(f"arm {FULL}, {best_variant(folder)}")

    # By arm, the metrics of each seed.
    cells: dict[str, list[dict[str, float]]] = {}
    for name in names:
        runs = sorted((c for c in kept if c["name"] == name), key=lambda c: c["seed"])
        # Claims pair seeds by their place: nothing after a missing one counts.
        runs = [c for place, c in enumerate(runs, 1) if c["seed"] == place]
        if runs:
            cells[name.removeprefix("arm ")] = [
                {k: v for k, v in c.items() if k not in ("name", "seed", "rate")} for c in runs
            ]
    if cells:
        write_report_of(config, folder, cells, kept)
    for path in sorted(folder.parent.glob("cost-*.json")):
        atomic_write(out / path.name, path.read_text())


def write_report_of(
    config: StudyConfig, folder: Path, cells: Any, kept: list[dict[str, Any]]
) -> None:
    out, pair = Path(config.out), PairConfig()
    tests = draw_scenes(config.tests, SCENE_SEEDS["test"])
    teacher_scores = score_segmenter(demo_teacher(pair), tests)
    teacher = {
        "mIoU": [teacher_scores.mean_iou()], "boundary F": [teacher_scores.boundary_f()],
        **{f"IoU {k}": [100 * float(v)] for k, v in enumerate(teacher_scores.iou())},
    }  # fmt: skip

    report = Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=[PROG],
        seeds=list(range(1, config.seeds + 1)),
        seconds=sum(c["seconds"] for c in kept),
        rows=[
            Row("teacher", "trained on more labels", teacher), *arm_rows(cells), *tuned_rows(kept),
        ],
        claims=[*acceptance_claims(cells), *confirmed_claim(cells, best_variant(folder))],
        notes=[*setting_notes(pair), rates_note(kept)],
        files=["arms.png", "maps.png"],
        environment=environment(("mmsegmentation",)),
    )  # fmt: skip

    # Pictures need the first seed's students.
    staging = folder / "report"
    staging.mkdir(exist_ok=True)
    figures = draw_bar_chart(cells, teacher["mIoU"][0], out / "arms.png")
    alone, full = (load_student(folder, name, pair) for name in ("alone", FULL))
    if alone is not None and full is not None:
        figures += draw_label_maps(alone, full, tests, out / "maps.png")
    write_report(report, staging, figures=figures)
    atomic_write(out / "study.json", (staging / "report.json").read_text())
    print(time.strftime("%H:%M"), *(f"{c.id} {c.gaps}" for c in report.claims), sep="\n")


def tuned_rows(kept: list[dict[str, Any]]) -> list[Row]:
    """What was tried on development scenes."""
    tuned: dict[str, list[dict[str, Any]]] = {}
    for cell in kept:
        if cell["seed"] in TUNING_SEEDS:
            tuned.setdefault(cell["name"], []).append(cell)
    return [
        Row(name, "development scenes", {k: [c[k] for c in runs] for k in ("mIoU", "boundary F")})
        for name, runs in tuned.items()
    ]


def confirmed_claim(cells: dict[str, list[dict[str, float]]], variant: str | None) -> list[Claim]:
    """Whether the contrast adds to mimicking in the form that development scenes chose."""
    better, worse = cells.get(f"{FULL}, {variant}", []), cells.get(MIMICKING, [])
    if len(better) != len(worse) or not better:
        return []
    gaps = [b["mIoU"] - w["mIoU"] for b, w in zip(better, worse, strict=True)]
    return [Claim("contrast-tuned", f"contrast, {variant}, adds to KD with mimicking", gaps)]


def rates_note(kept: list[dict[str, Any]]) -> str:
    """Which arms had both rates tried on development scenes; the others took 0.008."""
    tried = [{c["name"] for c in kept if c["name"].startswith(f"rate {rate:g} ")} for rate in RATES]
    arms_by_rate = [{name.split(" ", 2)[2] for name in names} for names in tried]
    complete = [arm.name for arm in ARMS if all(arm.name in names for names in arms_by_rate)]
    return (
        f"both rates, 0.003 and 0.008, were tried with seeds {TUNING_SEEDS} for: "
        f"{', '.join(complete) or 'no arm'}"
    )


def load_student(folder: Path, name: str, pair: PairConfig) -> Segmenter | None:
    path = folder / f"arm_{name.replace(' ', '_')}-1.safetensors"
    if not path.exists():
        return None
    student = Segmenter(pair.student_width)
    student.load_state_dict(load_file(path))
    return student


if __name__ == "__main__":
    main()
