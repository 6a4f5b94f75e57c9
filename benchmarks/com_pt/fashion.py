"""A chain of three vision transformers on Fashion-MNIST, against the same models trained alone.

The question is the paper's: with 0.19 and 0.12 of the updates, is every member within 0.5 points of the
one trained alone, and what does the family cost? T, S and B are the paper's ViTs in small: each is
twice as wide as the one before it, all have the same depth and heads of 16 channels. Members alone are
trained to saturation. Every way of training has a peak rate of its own, tuned for every member at a
tenth of the length on development data with a seed of its own; baselines get the same trials.

A cell is one model trained in one way with one seed. Finished cells are kept as JSON beside the
results, so that a study that was stopped, or moved to another machine, goes on. ``--plan`` prints what
is left to do and how long that takes, ``--report`` only writes the tables and the figure.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.com_pt.fashion_data import CONTEXT_LENGTH, FOLDER, WORDS
from com_pt.demo.arms import CellPlan, Setup, train_cell
from com_pt.training.tasks.registry import open_task
from effml_common.device import DEVICE_HELP, resolve_device
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse

PROG = "python -m benchmarks.com_pt.fashion"
EXAMPLES = (f"{PROG} --plan", PROG, f"{PROG} --family clip --seeds 1")
RESULTS = Path(__file__).parent / "results"

BATCH, WARMUP = 128, 200
UPDATES = {"vit": 11_232, "clip": 3_744}  # 24 and 8 passes over 60,000 pictures
WEIGHT_DECAY = 0.1  # the default of a stage
SHARES = {"T": 1.0, "S": 0.19, "B": 0.12}  # of the updates alone, as in the paper's chain
LATE = 0.8  # share of the updates after which a member should be saturated
TUNING_SEED, TUNING_SHARE = 0, 0.1
RATES = (1e-3, 2e-3, 4e-3)  # tried first; the grid is extended while an end of it is the best
MORE_RATES = 3  # at most

# How a member is trained: alone, in a chain, from scratch with the updates of the chain, or alone with
# a complete schedule of four fifths of the updates. Every cosine gains in its own last fifth; whether a
# member is saturated is seen from what a whole schedule of the full length gains over the shorter one.
WAYS = {
    "alone": "scratch",
    "chain": "embed + feature",
    "short": "scratch",
    "four fifths": "scratch",
}
Family = Literal["vit", "clip"]


def vit(width: int) -> dict[str, Any]:
    """Return a timm ViT for 28x28 grey pictures: 16 patches, four layers, heads of 16 channels."""
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    shape = {"embed_dim": width, "depth": 4, "num_heads": width // 16}
    return {"name": "vit_tiny_patch16_224", **size, **shape}


def clip(width: int) -> dict[str, Any]:
    """Return an open_clip model with the same image tower and a text tower of half the width."""
    vision = {"image_size": 28, "patch_size": 7, "layers": 4, "width": width, "head_width": 16}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": len(WORDS) + 2, "layers": 2}
    heads = {"width": width // 2, "heads": width // 32}
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {**text, **heads}}


MEMBERS = {
    "vit": {"T": vit(32), "S": vit(64), "B": vit(128)},
    "clip": {"T": clip(32), "S": clip(64), "B": clip(128)},
}
TASKS = {
    "vit": ("benchmarks.com_pt.fashion_data:FashionMnist", "top-1"),
    "clip": ("benchmarks.com_pt.fashion_data:FashionCaptions", "zero-shot top-1"),
}


@dataclass(frozen=True, kw_only=True)
class FashionConfig:
    """Train a family on Fashion-MNIST as a chain and alone."""

    family: Family = field(default="vit", metadata={"help": "models"})
    seeds: tuple[int, ...] = field(default=(1, 2, 3), metadata={"help": "of the confirming runs"})
    ways: tuple[str, ...] = field(default=tuple(WAYS), metadata={"help": "some of the ways"})
    data: str = field(default=FOLDER, metadata={"help": "folder of the data set's four files"})
    cells: str = field(default="runs/com-pt-fashion", metadata={"help": "folder of the models"})
    results: str | None = field(
        default=None, metadata={"help": "folder of the finished cells; default one for each device"}
    )
    device: str = field(default="auto", metadata={"help": DEVICE_HELP})
    minutes: float | None = field(
        default=None, metadata={"help": "begin no cell that would end later than this"}
    )
    plan: bool = field(default=False, metadata={"help": "only print what is left to do"})
    report: bool = field(default=False, metadata={"help": "only write the tables and the figure"})

    @property
    def records(self) -> Path:
        """Folder of the family's finished cells; cards and CPUs have folders of their own."""
        is_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
        folder = RESULTS / ("fashion" if is_cpu else "fashion-cuda")
        return (folder if self.results is None else Path(self.results)) / self.family


@dataclass(frozen=True)
class FashionCell:
    """One model, trained in one way.

    Attributes:
        name: Member and way.
        role: ``tune`` or ``confirm``.
        member: T, S or B.
        way: One of ``WAYS``.
        seed: The seed of initialisation, order and augmentation.
        updates: How many it gets.
        rate: Peak learning rate.
        source: Name of the cell that it is grown from; None without one.
    """

    name: str
    role: str
    member: str
    way: str
    seed: int
    updates: int
    rate: float
    source: str | None

    @property
    def file(self) -> str:
        """Name of the cell's folder and of its JSON."""
        words = f"{self.role} {self.name} {self.updates} {self.rate:g} seed {self.seed}"
        return words.replace(" ", "-")


def main() -> None:
    """Train the cells that are missing, and write the results of all there are."""
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(FashionConfig, words, prog=PROG, examples=EXAMPLES)
    if config.plan:
        return print_plan(config)
    if not config.report:
        device = resolve_device(config.device)
        if device.type == "cpu":
            torch.set_num_threads(1)
        run(config, device)
    from benchmarks.com_pt.fashion_report import write_results

    return write_results(config)


def run(config: FashionConfig, device: torch.device) -> None:
    """Train one missing cell after the other, as long as there is time."""
    began = time.monotonic()
    setups: dict[str, Any] = {"tune": None, "confirm": None}
    seen: dict[str, FashionCell] = {}
    for cell in cells(config):
        seen[cell.file] = cell
        if measured(config, cell) is not None:
            continue
        seconds = estimate(config, cell)
        left = 60 * (config.minutes or math.inf) - (time.monotonic() - began)
        if seconds is not None and seconds > left:
            print(f"no time left for {cell.file}", flush=True)
            break

        # Records are kept beside the results, models are not: what is gone is trained once more.
        missing = [cell]
        while missing[0].source is not None and not has_model(config, missing[0].source):
            missing.insert(0, seen[missing[0].source])
        setups[cell.role] = setups[cell.role] or make_setup(config, cell.role)
        for each in missing:
            record = train(config, each, setups[cell.role], device)
            print(time.strftime("%H:%M:%S"), each.file, record["value"], flush=True)


def has_model(config: FashionConfig, file: str) -> bool:
    """Return whether the model of a cell is still there."""
    return (Path(config.cells) / config.family / file / "cell.json").exists()


def make_setup(config: FashionConfig, role: str) -> Setup:
    """Read the data of a role, once for all its cells."""
    name, metric = TASKS[config.family]
    data = {"folder": config.data, "role": role}
    return Setup(
        task=open_task(name, data),
        task_name=name,
        data=data,
        members=MEMBERS[config.family],
        metric=metric,
        batch=BATCH,
        warmup_steps=WARMUP,
    )


def train(
    config: FashionConfig, cell: FashionCell, setup: Setup, device: torch.device
) -> dict[str, Any]:
    """Train a cell, and keep its record beside the results."""
    # A predecessor is trained in the same role, so that it never saw what the cell is judged on.
    folder = Path(config.cells) / config.family
    plan = CellPlan(
        cell=cell.name,
        member=cell.member,
        arm=WAYS[cell.way],
        steps=cell.updates,
        seed=cell.seed,
        lr=cell.rate,
        eval_every=round(LATE * cell.updates),
    )
    source = None if cell.source is None else folder / cell.source
    is_new = not (folder / cell.file).exists()
    (folder / cell.file).mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    trained = train_cell(setup, plan, folder / cell.file, source, device)

    # On a CPU the time of this process counts, whatever else the machine is doing.
    seconds = trained.seconds if device.type == "cuda" else time.process_time() - began

    # What the member was worth after four fifths of the updates.
    stage = next((folder / cell.file / "run" / "run").glob(f"stage-*-{cell.member}"))
    lines = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    late = next(
        (line[f"val {setup.metric}"] for line in lines if f"val {setup.metric}" in line), None
    )

    record = {
        **asdict(cell),
        "file": cell.file,
        "value": trained.value,
        "start": trained.start,
        "late": late,
        "macs": trained.macs,
        "seconds": seconds if is_new else None,  # None where a training was interrupted
        "forward": trained.forward,
        "device": str(device),
    }
    path = config.records / f"{cell.file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        atomic_write(path, json.dumps(record, indent=1) + "\n")
    return record


def measured(config: FashionConfig, cell: FashionCell) -> dict[str, Any] | None:
    """Return the record of a finished cell."""
    path = config.records / f"{cell.file}.json"
    return json.loads(path.read_text()) if path.exists() else None


def cells(config: FashionConfig) -> Iterator[FashionCell]:
    """Yield all cells in an order in which the earlier ones are what the later ones need.

    Rates of tuned ways are known once their trials are finished, so this is read while it runs.
    """
    # A chain's trials are grown from the best trial of the member before it.
    best: dict[tuple[str, str], FashionCell] = {}
    for member, way in ways(config):
        source = predecessor(member, way, best)
        for rate in grid(config, member, way, source):
            cell = make_cell(config, "tune", member, way, TUNING_SEED, rate, source)
            yield cell
        best[member, way] = best_trial(config, member, way, source)

    # Confirming runs: chains first, because they are short, the long baselines last.
    for seed in config.seeds:
        trained: dict[tuple[str, str], FashionCell] = {}
        for member, way in ways(config):
            source = predecessor(member, way, trained)
            cell = make_cell(config, "confirm", member, way, seed, best[member, way].rate, source)
            trained[member, way] = cell
            yield cell

    # Last, whether the members alone are saturated; at the rates of those.
    if "four fifths" in config.ways:
        for member, seed in product(SHARES, config.seeds):
            rate = best_trial(config, member, "alone", None).rate
            yield make_cell(config, "confirm", member, "four fifths", seed, rate, None)


def ways(config: FashionConfig) -> Iterator[tuple[str, str]]:
    """Yield members and ways, every chain after what it is grown from; the longest trainings last."""
    yield "T", "alone"
    for way in config.ways:
        if way not in ("alone", "four fifths"):
            yield "S", way
            yield "B", way
    if "alone" in config.ways:
        yield "S", "alone"
        yield "B", "alone"


def predecessor(
    member: str, way: str, trained: dict[tuple[str, str], FashionCell]
) -> FashionCell | None:
    """Return the cell that a member of a chain is grown from."""
    if way != "chain":
        return None
    return trained[("T", "alone") if member == "S" else ("S", way)]


def make_cell(
    config: FashionConfig,
    role: str,
    member: str,
    way: str,
    seed: int,
    rate: float,
    source: FashionCell | None,
) -> FashionCell:
    """Make a cell with the updates of its way, or a tenth of them for tuning."""
    share = {"alone": 1.0, "four fifths": LATE}.get(way, SHARES[member])
    share *= TUNING_SHARE if role == "tune" else 1.0
    updates = round(share * UPDATES[config.family])
    before = None if source is None else source.file
    return FashionCell(f"{member} {way}", role, member, way, seed, updates, rate, before)


def grid(
    config: FashionConfig, member: str, way: str, source: FashionCell | None
) -> Iterator[float]:
    """Yield the rates to try: a fixed grid, and beyond it as long as an end is the best."""
    rates = [*RATES]
    yield from rates

    # Only rates of this walk count, so that a study that goes on walks the same way again.
    while len(rates) < len(RATES) + MORE_RATES:
        values = trials(config, member, way, source)
        best = max((rate for rate in rates if rate in values), key=lambda rate: values[rate])
        if best not in (max(rates), min(rates)):
            return
        rates.append(best * 2 if best == max(rates) else best / 2)
        yield rates[-1]


def trials(
    config: FashionConfig, member: str, way: str, source: FashionCell | None
) -> dict[float, float]:
    """Return the development accuracy of every rate that was tried."""
    values = {}
    for power in range(-3, 7):
        cell = make_cell(config, "tune", member, way, TUNING_SEED, RATES[0] * 2.0**power, source)
        record = measured(config, cell)
        if record is not None:
            values[cell.rate] = record["value"]
    return values or {RATES[0]: 0.0, RATES[1]: 1.0, RATES[2]: 0.0}  # a plan before any trial


def best_trial(
    config: FashionConfig, member: str, way: str, source: FashionCell | None
) -> FashionCell:
    """Return the trial with the best development accuracy."""
    values = trials(config, member, way, source)
    rate = max(values, key=lambda rate: values[rate])
    return make_cell(config, "tune", member, way, TUNING_SEED, rate, source)


def estimate(config: FashionConfig, cell: FashionCell) -> float | None:
    """Return the seconds that a cell will take, from a finished one like it; None without one."""
    folder = config.records
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    alike = [r for r in records if r["member"] == cell.member and r["seconds"] is not None]
    alike = [r for r in alike if (r["source"] is None) == (cell.source is None)] or alike
    if not alike:
        return None
    return cell.updates * sum(r["seconds"] for r in alike) / sum(r["updates"] for r in alike)


def print_plan(config: FashionConfig) -> None:
    """Print the cells that are missing, and how long they will take."""
    total, unknown = 0.0, 0
    for cell in cells(config):
        if measured(config, cell) is not None:
            continue
        seconds = estimate(config, cell)
        total, unknown = total + (seconds or 0), unknown + (seconds is None)
        print(f"{cell.file}: {'unknown' if seconds is None else f'{seconds:.0f} s'}")
    print(f"{total / 3600:.2f} hours on one thread, and {unknown} cells of unknown length")


if __name__ == "__main__":
    main()
