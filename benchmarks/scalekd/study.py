"""ScaleKD beside other ways to train the same small students, cell by cell.

A Swin is trained on an unlimited stream of drawn images, the students on a few hundred labelled ones;
or on most of scikit-learn's digits, the students on a few of them. The teacher gate comes first: a
teacher less than 3 points above the student alone ends the study. Every arm tries, for every kind of
student, the same learning rates on a development seed and then other strengths of its distillation
term; the confirming seeds are others. Cells are kept in a folder, so that a stopped study goes on;
``--report`` only writes the tables and figures.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from effml_common.device import DEVICE_HELP, resolve_device
from effml_common.errors import InputError, NonFiniteError
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import Report, environment
from scalekd.demo.arms import BASELINES
from scalekd.demo.data import Data, test_images, training_images
from scalekd.demo.models import build_demo_teacher
from scalekd.demo.plots import plot
from scalekd.demo.tables import claims_of, rows_of
from scalekd.demo.training import check_teacher_lead, load_or_train_teacher, train_arm
from scalekd.method.metrics import top1_percent

KINDS = ("mlp", "vit", "cnn")
DEVELOPMENT_SEED, SEEDS = 77, (1, 2, 3, 4, 5)
RATES, STRENGTHS = (3e-3, 8e-3, 2e-2), (0.3, 1.0, 3.0)
# Labelled images and epochs of the students: too few of either for the labels alone.
BUDGETS: dict[str, tuple[int, int]] = {"drawn": (400, 30), "digits": (100, 60)}
LONGER = 4  # times as many epochs
Phase = Literal["gate", "arms", "longer", "untrained", "sizes", "components"]
COMPONENTS = ("cap", "cap+dfm", "cap+tpp", "cap+dfm+tpp")
RESULTS = Path(__file__).parent / "results"
WIDTHS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare ScaleKD with other ways to train small students."""

    data: Data = field(default="drawn", metadata={"help": "images"})
    cells: str = field(default="runs/scalekd-study", metadata={"help": "folder of the cells"})
    phases: tuple[Phase, ...] = field(
        default=("gate", "arms", "longer", "untrained", "sizes", "components"),
        metadata={"help": "parts to run, in order"},
    )
    device: str = field(default="auto", metadata={"help": DEVICE_HELP})
    report: bool = field(default=False, metadata={"help": "only write tables and figures"})


class Study:
    """Cells: one trained student each."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.folder = config, Path(config.cells) / config.data
        self.device = resolve_device(config.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.labelled, self.epochs = BUDGETS[config.data]
        self.test = test_images(config.data)

    def teacher(self, width: int) -> Any:
        """The trained teacher of one width."""
        return load_or_train_teacher(width, data=self.config.data, device=self.device)

    def cell(
        self, arm: str, kind: str, seed: int, rate: float, strength: float,
        width: int = 32, trained: bool = True, longer: int = 1,
    ) -> float:  # fmt: skip
        """Accuracy of one student, trained unless it is known already."""
        teacher = f"w{width}" if trained else "untrained"
        name = f"{arm.replace(' ', '_')}-{kind}-{teacher}-s{seed}-r{rate:g}-x{strength:g}"
        file = self.folder / (name + (".json" if longer == 1 else f"-e{longer}.json"))
        if file.exists():
            return json.loads(file.read_text())["accuracy"]

        # The teacher, and the labelled images of the seed.
        network = self.teacher(width)
        if not trained:
            network = build_demo_teacher(width, network.num_classes, seed=9).to(self.device).eval()
        images = training_images(self.labelled, seed, self.config.data)

        # A run that diverges has learned nothing.
        started = time.process_time()
        try:
            student = train_arm(
                arm, kind, network, images,
                epochs=longer * self.epochs, rate=rate, seed=seed, strength=strength,
            )  # fmt: skip
            top1 = top1_percent(student, self.test.x, self.test.y)
        except NonFiniteError:
            top1 = 0.0
        seconds = round(time.process_time() - started, 1)

        atomic_write(file, json.dumps({"accuracy": top1, "seconds": seconds}))
        print(f"{file.stem}: {top1:.2f} % in {seconds} s", file=sys.stderr, flush=True)
        return top1

    def tune(self, arm: str, kind: str) -> tuple[float, float]:
        """Learning rate, then strength, that were best on the development seed."""
        rate = max(RATES, key=lambda rate: self.cell(arm, kind, DEVELOPMENT_SEED, rate, 1.0))
        if arm in ("alone", "mixup"):  # nothing is distilled
            return rate, 1.0
        return rate, max(STRENGTHS, key=lambda x: self.cell(arm, kind, DEVELOPMENT_SEED, rate, x))

    def arm(self, arm: str, kind: str, tuned_as: str = "", **options: Any) -> list[float]:
        """Accuracies over the confirming seeds."""
        rate, strength = self.tune(tuned_as or arm, kind)
        return [self.cell(arm, kind, seed, rate, strength, **options) for seed in SEEDS]

    def gate(self) -> float:
        """Accuracy of the teacher, which must be well above every student alone."""
        best = top1_percent(self.teacher(32), self.test.x, self.test.y)
        for kind in KINDS:
            alone = max(self.cell("alone", kind, DEVELOPMENT_SEED, rate, 1.0) for rate in RATES)
            check_teacher_lead(best, alone)
        return best

    def arms(self) -> None:
        """Each arm: rate and strength on the development seed, then the confirming seeds."""
        for kind in KINDS:
            for arm in (*BASELINES, "scalekd"):
                self.arm(arm, kind)

    def longer(self) -> None:
        """Whether more updates change the order of the arms; as tuned for the shorter runs."""
        for kind in KINDS:
            for arm in ("scalekd", "fitnet", "timm features", "dist", "alone"):
                rate, strength = self.tune(arm, kind)
                for seed in (DEVELOPMENT_SEED, *SEEDS):
                    self.cell(arm, kind, seed, rate, strength, longer=LONGER)

    def components(self) -> None:
        """Each part on its own, at ScaleKD's rate and strength."""
        for kind in KINDS:
            for arm in COMPONENTS:
                self.arm(arm, kind, tuned_as="scalekd")

    def untrained(self) -> None:
        """A teacher that knows nothing: features only, since its logits are noise."""
        for kind in KINDS:
            self.arm("cap+dfm+tpp", kind, tuned_as="scalekd", trained=False)

    def sizes(self) -> None:
        """Teachers of several widths."""
        for kind in KINDS:
            for width in WIDTHS:
                self.arm("scalekd", kind, width=width)

    def table(self) -> dict[tuple[str, str, str], dict[int, float]]:
        """All confirming cells at hand: (arm, kind, teacher) -> seed -> accuracy."""
        table: dict[tuple[str, str, str], dict[int, float]] = {}
        for file in sorted(self.folder.glob("*.json")):
            arm, kind, teacher, seed, *_ = file.stem.split("-")
            number = int(seed[1:])
            if file.stem.endswith(f"-e{LONGER}"):
                kind = f"{kind}, {LONGER * self.epochs} epochs"
            if number in SEEDS:
                value = json.loads(file.read_text())["accuracy"]
                table.setdefault((arm.replace("_", " "), kind, teacher), {})[number] = value
        return {key: seeds for key, seeds in table.items() if set(seeds) == set(SEEDS)}

    def choices(self, table: dict[tuple[str, str, str], Any]) -> list[str]:
        """What was tuned, for every arm that has run."""
        return [
            f"{kind}: " + ", ".join(
                f"{arm} {rate:g}" + ("" if strength == 1 else f" x{strength:g}")
                for arm in (*BASELINES, "scalekd")
                if (arm, kind, "w32") in table
                for rate, strength in [self.tune(arm, kind)]
            )
            for kind in KINDS
        ]  # fmt: skip


def write_results(study: Study, seconds: float) -> Report:
    """Tables, claims and figures in ``benchmarks/scalekd/results``."""
    table, config = study.table(), study.config
    teachers = {
        w: top1_percent(study.teacher(w), study.test.x, study.test.y)
        for w in WIDTHS
        if has(table, f"w{w}")
    }

    report = Report(
        package="scalekd",
        version=version("scalekd"),
        command=["python", "-m", "benchmarks.scalekd.study", "--data", config.data],
        seeds=list(SEEDS),
        seconds=seconds,
        rows=rows_of(table),
        claims=claims_of(table),
        notes=[
            f"top-1 on {len(study.test.y)} images; {study.labelled} labelled images, "
            f"{study.epochs} epochs unless a row says otherwise, all tuned with these",
            "a seed varies labelled images, initial weights and order",
            f"rate, best of {list(RATES)}, then strength of the distillation term, best of "
            f"{list(STRENGTHS)}, for every arm and student on seed {DEVELOPMENT_SEED}",
            *study.choices(table),
            *(f"teacher of width {w}: {top1:.1f} %" for w, top1 in teachers.items()),
        ],
        environment=environment(("timm",), str(study.device)),
    )

    document = json.dumps(report.to_json(), indent=1, allow_nan=False)
    atomic_write(RESULTS / f"{config.data}.json", document + "\n")
    plot(table, RESULTS, config.data)
    return report


def has(table: dict[tuple[str, str, str], Any], teacher: str) -> bool:
    """Whether some cell used this teacher."""
    return any(key[2] == teacher for key in table)


def main(argv: Sequence[str]) -> int:
    words = [word for word in argv if word not in COMMON_FLAGS]
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        config = parse(StudyConfig, words, prog="python -m benchmarks.scalekd.study")
        study = Study(config)
        for phase in () if config.report else config.phases:
            getattr(study, phase)()
        report = write_results(study, time.monotonic() - started)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    Console().print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
