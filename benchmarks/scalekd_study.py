"""ScaleKD beside other ways to train the same small students, cell by cell.

A Swin is trained on an unlimited stream of drawn images, the students on a few hundred labelled ones.
The teacher gate comes first: a teacher less than 3 points above the student alone ends the study.
Every arm tries the same learning rates on a development seed, with the Mixer; the confirming seeds are
others. Cells are
kept in a folder, so that a stopped study goes on; ``--report`` only writes the tables and figures.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from effml_common.cli import COMMON_FLAGS, parse
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.report import Report, environment
from scalekd.comparison import (
    BASELINES,
    RATES,
    accuracy,
    check_gate,
    test_images,
    train_arm,
    trained_teacher,
    training_images,
)
from scalekd.demo_data import CLASSES
from scalekd.demo_models import swin_teacher
from scalekd.tables import claims_of, plot, rows_of

KINDS = ("mlp", "vit", "cnn")
DEVELOPMENT, SEEDS = 77, (1, 2, 3)
FIRST = ("alone", "kd", "fitnet", "timm features")  # the rest when time allows
COMPONENTS = ("cap", "cap+dfm", "cap+tpp", "cap+dfm+tpp")
RESULTS = Path(__file__).parent / "results"
WIDTHS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare ScaleKD with other ways to train small students."""

    cells: str = field(default="runs/scalekd-study", metadata={"help": "folder of the cells"})
    phases: tuple[str, ...] = field(
        default=("gate", "arms", "components", "untrained", "sizes"),
        metadata={"help": "parts to run, in order"},
    )
    labelled: int = field(default=400, metadata={"help": "labelled images of the students"})
    epochs: int = field(default=30, metadata={"help": "epochs of every student"})
    report: bool = field(default=False, metadata={"help": "only write tables and figures"})


class Study:
    """Cells: one trained student each."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.folder = config, Path(config.cells)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.test = test_images()

    def cell(
        self, arm: str, kind: str, seed: int, rate: float, width: int = 32, trained: bool = True
    ) -> float:
        """Accuracy of one student, trained unless it is known already."""
        teacher = f"w{width}" if trained else "untrained"
        name = f"{arm.replace(' ', '_')}-{kind}-{teacher}-s{seed}-r{rate:g}.json"
        file = self.folder / f"{self.config.labelled}x{self.config.epochs}-{name}"
        if file.exists():
            return json.loads(file.read_text())["accuracy"]
        network = trained_teacher(width) if trained else swin_teacher(width, CLASSES, seed=9).eval()
        images, started = training_images(self.config.labelled, seed), time.process_time()
        student = train_arm(
            arm, kind, network, images, epochs=self.config.epochs, rate=rate, seed=seed
        )
        found = accuracy(student, self.test)
        seconds = round(time.process_time() - started, 1)
        atomic_write(file, json.dumps({"accuracy": found, "seconds": seconds}))
        print(f"{name}: {found:.2f} % in {seconds} s", file=sys.stderr, flush=True)
        return found

    def rate(self, arm: str) -> float:
        """The arm's best learning rate on the development seed, with the first kind of student."""
        return max(RATES, key=lambda rate: self.cell(arm, KINDS[0], DEVELOPMENT, rate))

    def arm(self, arm: str, kind: str, tuned_as: str = "", **options: Any) -> list[float]:
        """Accuracies over the confirming seeds."""
        rate = self.rate(tuned_as or arm)
        return [self.cell(arm, kind, seed, rate, **options) for seed in SEEDS]

    def gate(self) -> float:
        """Accuracy of the teacher, which must be well above every student alone."""
        best = accuracy(trained_teacher(), self.test)
        for kind in KINDS:
            check_gate(best, self.cell("alone", kind, DEVELOPMENT, RATES[0]))
        return best

    def arms(self) -> None:
        """Each arm: its rate on the development seed, then the confirming seeds."""
        for kind in KINDS:
            for arm in ("scalekd", *FIRST):
                self.arm(arm, kind)
        for kind in KINDS:
            for arm in BASELINES:
                self.arm(arm, kind)

    def components(self) -> None:
        """Each part on its own, at ScaleKD's rate."""
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
        found: dict[tuple[str, str, str], dict[int, float]] = {}
        head = f"{self.config.labelled}x{self.config.epochs}-"
        for file in sorted(self.folder.glob(f"{head}*.json")):
            arm, kind, teacher, seed, _ = file.stem.removeprefix(head).split("-", 4)
            number = int(seed[1:])
            if number in SEEDS:
                value = json.loads(file.read_text())["accuracy"]
                found.setdefault((arm.replace("_", " "), kind, teacher), {})[number] = value
        return found


def write_results(study: Study, seconds: float) -> Report:
    """Tables, claims and figures in ``benchmarks/results``."""
    table = {key: seeds for key, seeds in study.table().items() if set(seeds) == set(SEEDS)}
    config = study.config
    teachers = {w: accuracy(trained_teacher(w), study.test) for w in WIDTHS if has(table, f"w{w}")}
    report = Report(
        package="scalekd",
        version="0.1.0",
        command=["python", "benchmarks/scalekd_study.py"],
        seeds=list(SEEDS),
        seconds=seconds,
        rows=rows_of(table),
        claims=claims_of(table),
        notes=[
            f"top-1 on 2000 drawn images; {config.labelled} labelled images, {config.epochs} epochs",
            "a seed varies labelled images, initial weights and order",
            f"learning rate of every arm: best of {list(RATES)} for the {KINDS[0]} student on seed "
            f"{DEVELOPMENT}, used for all students",
            *(f"teacher of width {w}: {found:.1f} %" for w, found in teachers.items()),
        ],
        environment=environment(("timm",)),
    )
    document = json.dumps(report.to_json(), indent=1, allow_nan=False)
    atomic_write(RESULTS / "scalekd.json", document + "\n")
    plot(table, RESULTS)
    return report


def has(table: dict[tuple[str, str, str], Any], teacher: str) -> bool:
    """Whether some cell used this teacher."""
    return any(key[2] == teacher for key in table)


def main(argv: Sequence[str]) -> int:
    words = [word for word in argv if word not in COMMON_FLAGS]
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        config = parse(StudyConfig, words, prog="python benchmarks/scalekd_study.py")
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
