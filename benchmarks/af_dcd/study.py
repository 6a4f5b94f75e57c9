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

from af_dcd.config import BenchConfig, PairConfig
from af_dcd.demo.arms import ARMS, FULL, MIMICKING, Arm
from af_dcd.demo.data import draw
from af_dcd.demo.models import SEEDS, demo_teacher, score
from af_dcd.demo.plots import bar_chart, maps_picture
from af_dcd.demo.report import MATCHED, claims_of, matched_steps, notes_of, rows_of
from af_dcd.demo.training import Training, run_arm
from effml_common.cli import COMMON_FLAGS, parse
from effml_common.files import atomic_write
from effml_common.report import Claim, Report, Row, environment, write_report

PROG = "python -m benchmarks.af_dcd.study"
EXAMPLES = (PROG, f"{PROG} --phases cost", f"{PROG} --report")
Phase = Literal["rates", "arms", "time", "variants", "confirm", "cost"]
CENTRAL = ("alone", "KD", MIMICKING, FULL)
RATES = (3e-3, 8e-3)
DEVELOPMENT = 100  # seed of what is varied
TUNING = (DEVELOPMENT, 101)  # seeds of what is tuned
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
            "rates": rates, "arms": arms, "time": equal_time, "variants": variants,
            "confirm": confirm, "cost": cost,
        }  # fmt: skip
        for phase in config.phases:
            run[phase](config, folder)
    write(config, folder)


def path_of(folder: Path, name: str, seed: int) -> Path:
    """File of a cell."""
    return folder / f"{name.replace(' ', '_').replace('/', '-')}-{seed}.json"


def cell(
    config: StudyConfig, folder: Path, name: str, arm: Arm, seed: int, steps: int,
    pair: PairConfig | None = None, scenes: str = "test",
) -> dict[str, float]:  # fmt: skip
    """One training, or what is kept of it if it had the same rate."""
    path = path_of(folder, name, seed)
    if not path.exists() or json.loads(path.read_text())["rate"] != arm.rate:
        pair = pair or PairConfig()
        training = Training(
            arm,
            pair,
            demo_teacher(pair),
            draw(pair.scenes, SEEDS["students"]),
            seed,
            arm.rate,
            steps,
        )
        done = run_arm(training, draw(config.tests, SEEDS[scenes]))
        atomic_write(
            path, json.dumps({"name": name, "seed": seed, "rate": arm.rate, **done.metrics}) + "\n"
        )
        if seed == 1:
            weights = {k: v.contiguous() for k, v in done.student.state_dict().items()}
            atomic_write(path.with_suffix(".safetensors"), save(weights))
        shown = {k: round(done.metrics[k], 2) for k in ("mIoU", "boundary F", "seconds")}
        print(name, seed, shown, flush=True)
    return json.loads(path.read_text())


def rates(config: StudyConfig, folder: Path) -> None:
    for arm in ARMS:
        for rate in RATES:
            for seed in TUNING:
                rated, name = replace(arm, rate=rate), f"rate {rate:g} {arm.name}"
                cell(config, folder, name, rated, seed, config.steps, scenes="development")


def rated(folder: Path, arm: Arm) -> Arm:
    """The arm at the rate that was better on development scenes."""
    found = {}
    for rate in RATES:
        paths = [path_of(folder, f"rate {rate:g} {arm.name}", seed) for seed in TUNING]
        if all(path.exists() for path in paths):
            found[rate] = sum(json.loads(path.read_text())["mIoU"] for path in paths)
    # Half a comparison chooses nothing: then the rate that was better for those that were compared.
    return (
        replace(arm, rate=max(found, key=lambda r: found[r])) if len(found) == len(RATES) else arm
    )


def arms(config: StudyConfig, folder: Path) -> None:
    """What the main claims need first, on all seeds, then the other arms."""
    for wanted in (True, False):
        for seed in range(1, config.seeds + 1):
            for arm in ARMS:
                if (arm.name in CENTRAL) is wanted:
                    cell(config, folder, f"arm {arm.name}", rated(folder, arm), seed, config.steps)


def equal_time(config: StudyConfig, folder: Path) -> None:
    path = folder / "matched.json"
    if not path.exists():
        pair = PairConfig()
        steps = matched_steps(ARMS, pair, demo_teacher(pair), config.steps)
        atomic_write(path, json.dumps(steps) + "\n")
    matched = json.loads(path.read_text())
    print("steps at equal time", matched, flush=True)
    for seed in range(1, config.seeds + 1):
        for arm in ARMS:
            if arm.name in MATCHED:
                name = f"arm {arm.name}, equal time"
                cell(config, folder, name, rated(folder, arm), seed, matched[arm.name])


def variants(config: StudyConfig, folder: Path) -> None:
    for name, (method, pair) in VARIANTS.items():
        for arm in ARMS:
            # A change of the setting, not of the method, needs mimicking without contrast beside it.
            wanted = (FULL, MIMICKING) if pair or "mask_ratio" in method else (FULL,)
            if arm.name in wanted:
                changed = replace(rated(folder, arm), method={**arm.method, **method})
                told = f"variant {name}: {arm.name}"
                where = PairConfig(**pair)
                cell(config, folder, told, changed, DEVELOPMENT, config.steps, where, "development")


def best_variant(folder: Path) -> str | None:
    """The change of the method, on the study's own scenes and teacher, with the highest mIoU."""
    found = {}
    for name, (_, pair) in VARIANTS.items():
        path = path_of(folder, f"variant {name}: {FULL}", DEVELOPMENT)
        if not pair and path.exists():
            found[name] = json.loads(path.read_text())["mIoU"]
    return max(found, key=lambda name: found[name]) if found else None


def confirm(config: StudyConfig, folder: Path) -> None:
    name = best_variant(folder)
    if name is None:
        return
    arm = next(arm for arm in ARMS if arm.name == FULL)
    changed = replace(rated(folder, arm), method={**arm.method, **VARIANTS[name][0]})
    for seed in range(1, config.seeds + 1):
        cell(config, folder, f"arm {FULL}, {name}", changed, seed, config.steps)


def cost(config: StudyConfig, folder: Path) -> None:
    from af_dcd.commands.bench import bench

    path = folder.parent / f"cost-cityscapes-{config.device}.json"
    if not path.exists():
        asked = BenchConfig(device=config.device, repeats=3, out=str(folder.parent / "bench"))
        atomic_write(path, json.dumps(bench(asked).to_json(), indent=1) + "\n")


def write(config: StudyConfig, folder: Path) -> None:
    out = Path(config.out)
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    kept = [each for each in kept if "mIoU" in each]
    cells: dict[str, list[dict[str, float]]] = {}
    names = [f"arm {arm.name}" for arm in ARMS] + [f"arm {name}, equal time" for name in MATCHED]
    names.append(f"arm {FULL}, {best_variant(folder)}")
    for name in names:
        found = sorted((c for c in kept if c["name"] == name), key=lambda c: c["seed"])
        # Claims pair seeds by their place: nothing after a missing one counts.
        found = [c for place, c in enumerate(found, 1) if c["seed"] == place]
        if found:
            numbers = [
                {k: v for k, v in c.items() if k not in ("name", "seed", "rate")} for c in found
            ]
            cells[name.removeprefix("arm ")] = numbers
    if cells:
        write_report_of(config, folder, cells, kept, out)
    for path in sorted(folder.parent.glob("cost-*.json")):
        atomic_write(out / path.name, path.read_text())


def write_report_of(
    config: StudyConfig, folder: Path, cells: Any, kept: list[dict[str, Any]], out: Path
) -> None:
    pair = PairConfig()
    tests = draw(config.tests, SEEDS["test"])
    best = score(demo_teacher(pair), tests)
    teacher = {"mIoU": [best.mean_iou()], "boundary F": [best.boundary_f()]}
    teacher |= {f"IoU {k}": [100 * float(v)] for k, v in enumerate(best.iou())}
    tuned: dict[str, list[dict[str, Any]]] = {}
    for c in kept:
        if c["seed"] in TUNING:
            tuned.setdefault(c["name"], []).append(c)
    tried = [
        Row(name, "development scenes", {k: [c[k] for c in runs] for k in ("mIoU", "boundary F")})
        for name, runs in tuned.items()
    ]
    report = Report(
        package="af-dcd",
        version=version("af-dcd"),
        command=[PROG],
        seeds=list(range(1, config.seeds + 1)),
        seconds=sum(c["seconds"] for c in kept),
        rows=[Row("teacher", "trained on more labels", teacher), *rows_of(cells), *tried],
        claims=[*claims_of(cells), *confirmed(cells, best_variant(folder))],
        notes=[*notes_of(pair), rates_note(kept)],
        files=["arms.png", "maps.png"],
        environment=environment(("mmsegmentation",)),
    )
    staging = folder / "report"
    staging.mkdir(exist_ok=True)
    figures = bar_chart(cells, teacher["mIoU"][0], out / "arms.png")
    students = [student_of(folder, name, pair) for name in ("alone", FULL)]
    if all(students):
        figures += maps_picture(students[0], students[1], tests, out / "maps.png")
    write_report(report, staging, figures=figures)
    atomic_write(out / "study.json", (staging / "report.json").read_text())
    print(time.strftime("%H:%M"), *(f"{c.id} {c.gaps}" for c in report.claims), sep="\n")


def confirmed(cells: dict[str, list[dict[str, float]]], variant: str | None) -> list[Claim]:
    """Whether the contrast adds to mimicking in the form that development scenes chose."""
    better, worse = cells.get(f"{FULL}, {variant}", []), cells.get(MIMICKING, [])
    if len(better) != len(worse) or not better:
        return []
    gaps = [b["mIoU"] - w["mIoU"] for b, w in zip(better, worse, strict=True)]
    return [Claim("contrast-tuned", f"contrast, {variant}, adds to KD with mimicking", gaps)]


def rates_note(kept: list[dict[str, Any]]) -> str:
    """Which arms had both rates tried on development scenes; the others took 0.008."""
    tried = [{c["name"] for c in kept if c["name"].startswith(f"rate {rate:g} ")} for rate in RATES]
    ends = [{name.split(" ", 2)[2] for name in names} for names in tried]
    both = [arm.name for arm in ARMS if all(arm.name in names for names in ends)]
    return (
        f"both rates, 0.003 and 0.008, were tried with seeds {TUNING} for: "
        f"{', '.join(both) or 'no arm'}"
    )


def student_of(folder: Path, name: str, pair: PairConfig) -> Any:
    from af_dcd.demo.models import Segmenter

    path = folder / f"arm_{name.replace(' ', '_')}-1.safetensors"
    if not path.exists():
        return None
    student = Segmenter(pair.student_width)
    student.load_state_dict(load_file(path))
    return student


if __name__ == "__main__":
    main()
