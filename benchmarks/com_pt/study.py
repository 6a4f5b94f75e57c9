"""Chains against individual training: accuracy against compute, arm by arm, on three small families.

A cell is one member trained in one way with one seed; finished cells are kept, so a study that was
stopped goes on where it was. ``--report`` only writes the results of the cells there are. Seed 0 is for
tuning; claims come from the other seeds.
"""

import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from com_pt.demo.analysis import cell_rows, draw_curve, family_rows, paper_claims, target_notes
from com_pt.demo.arms import ARMS, Cell, CellPlan, Setup, read_or_train_cell
from com_pt.demo.models import pair_model
from com_pt.training.tasks.registry import open_task
from effml_common.files import atomic_write
from effml_common.parsing import COMMON_FLAGS, parse
from effml_common.report import Report, environment, write_report

PROG = "python -m benchmarks.com_pt.study"
# Arms of the largest member, which costs most.
LARGEST = ("scratch", "feature only", "lossless",
           "official + feature", "embed + feature", "lossless + feature")  # fmt: skip
EXAMPLES = (PROG, f"{PROG} --family vit --seeds 1 2 3")


@dataclass(frozen=True)
class Family:
    """A chain to study: sizes, budget and what is measured.

    Args:
        alone: Updates of individual training.
        stage: Updates of a chain stage: 0.19 of them, 0.12 for the largest member.
        longer: Further lengths of complete schedules of the largest member.
        members: From small to large; the first is only in the four-member chain.
        lr: Peak rate of individual training, by member.
        stage_lr: Peak rate of stages that start from a predecessor's weights, by member.
        short_lr: Peak rate of stages that start from random weights.
        gap: What a lossless family may lose of the metric.
    """

    task: str
    data: dict[str, Any]
    members: dict[str, Any]
    batch: int
    lr: dict[str, float]
    stage_lr: dict[str, float]
    short_lr: float
    alone: int
    stage: dict[str, int]
    longer: tuple[int, ...]
    metric: str
    gap: float
    larger_is_better: bool = True


def vit(width: int, depth: int) -> dict[str, Any]:
    name = "vit_tiny_patch16_224"
    size = {"img_size": 8, "patch_size": 2, "embed_dim": width, "num_heads": width // 16}
    return {"name": name, "depth": depth, "num_classes": 10, **size}


def llama(width: int, depth: int) -> dict[str, Any]:
    heads = width // 16
    size = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
    return {"vocab_size": 257, "intermediate_size": 2 * width, "num_hidden_layers": depth, **size,
            "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip


FAMILIES = {
    "clip": Family(
        "com_pt.demo.data:DigitPairs", {},
        {"N": pair_model(32, 32), "T": pair_model(64, 64), "S": pair_model(128, 64),
         "B": pair_model(128, 64, 4)},
        batch=64, lr={"N": 4e-3, "T": 4e-3, "S": 2e-3, "B": 1e-3},
        stage_lr={"T": 4e-3, "S": 4e-3, "B": 1e-3}, short_lr=1e-3,
        alone=1600, stage={"T": 304, "S": 304, "B": 192}, longer=(480,),
        metric="zero-shot top-1", gap=0.005,
    ),
    "vit": Family(
        "com_pt.demo.data:DigitImages", {},
        {"N": vit(16, 2), "T": vit(32, 2), "S": vit(64, 2), "B": vit(128, 4)},
        batch=64, lr={"N": 3e-3, "T": 3e-3, "S": 3e-3, "B": 3e-3},
        stage_lr={"T": 3e-3, "S": 3e-3, "B": 3e-3}, short_lr=3e-3,
        alone=1600, stage={"T": 304, "S": 304, "B": 192}, longer=(480,),
        metric="top-1", gap=0.005,
    ),
    "llama": Family(
        "causal-lm",
        {"train": [f"{sysconfig.get_path('stdlib')}/[a-m]*.py"],
         "val": [f"{sysconfig.get_path('stdlib')}/[t-z]*.py"], "length": 64, "val_blocks": 200},
        {"N": llama(16, 2), "T": llama(32, 2), "S": llama(64, 2), "B": llama(128, 4)},
        batch=16, lr={"N": 3e-3, "T": 3e-3, "S": 3e-3, "B": 3e-3},
        stage_lr={"T": 3e-3, "S": 3e-3, "B": 3e-3}, short_lr=3e-3,
        alone=1600, stage={"T": 304, "S": 304, "B": 192}, longer=(480,),
        metric="loss", gap=0.005, larger_is_better=False,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare ways to train a family."""

    family: Literal["clip", "vit", "llama"] = field(
        default="clip", metadata={"help": "what to train"}
    )
    seeds: tuple[int, ...] = field(default=(1, 2, 3), metadata={"help": "0 is for tuning"})
    start: str = field(
        default="lossless + feature", metadata={"help": "arm that later members start from"}
    )
    arms: tuple[str, ...] = field(default=tuple(ARMS), metadata={"help": "some of the arms"})
    lengths: bool = field(
        default=True, metadata={"help": "also 2- and 4-member chains and longer scratch runs"}
    )
    lr: float | None = field(default=None, metadata={"help": "another learning rate, for tuning"})
    cells: str = field(default="runs/com-pt", metadata={"help": "folder of the cells"})
    out: str = field(
        default="benchmarks/com_pt/results", metadata={"help": "folder of the results"}
    )
    report: bool = field(default=False, metadata={"help": "only write the report"})


def main() -> None:
    """Train the cells that are missing, and write the results of all there are."""
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(StudyConfig, words, prog=PROG, examples=EXAMPLES)
    torch.set_num_threads(1)

    # A folder for each family, and for each learning rate that is tried.
    family = FAMILIES[config.family]
    name = config.family + (f"-lr{config.lr:g}" if config.lr else "")
    folder = Path(config.cells) / name
    folder.mkdir(parents=True, exist_ok=True)
    if not config.report:
        train(family, config, folder)
    write(family, config, folder, name)


def order(
    family: Family, config: StudyConfig
) -> Iterator[tuple[str, str, str, str | None, int, int]]:
    """Yield (cell, member, arm, predecessor's cell, updates, seed), what later ones need first."""
    # The first member alone, and the second in every arm.
    smallest, first, second, third = family.members
    for seed in config.seeds:
        yield f"{first} alone", first, "scratch", None, family.alone, seed
        for arm in config.arms:
            yield f"{second} {arm}", second, arm, f"{first} alone", family.stage[second], seed

    # The third in some arms, from the second of the chain's arm; and both alone.
    for seed in config.seeds:
        for arm in (arm for arm in config.arms if arm in LARGEST):
            before = f"{second} {config.start}"
            yield f"{third} {arm}", third, arm, before, family.stage[third], seed
        for member in (second, third):
            yield f"{member} alone", member, "scratch", None, family.alone, seed

    # Longer schedules, and chains of two and four members.
    for seed in config.seeds if config.lengths else ():
        for steps in family.longer:
            yield f"{third} alone {steps}", third, "scratch", None, steps, seed
            before = f"{second} {config.start}"
            yield f"{third} {config.start} {steps}", third, config.start, before, steps, seed
        yield f"{third} of 2", third, config.start, f"{second} alone", family.stage[third], seed
        yield f"{smallest} alone", smallest, "scratch", None, family.alone, seed
        before = f"{smallest} alone"
        for member in (first, second, third):
            yield f"{member} of 4", member, config.start, before, family.stage[member], seed
            before = f"{member} of 4"


def train(family: Family, config: StudyConfig, folder: Path) -> None:
    """Train the cells of a family that are not in its folder yet."""
    setup = Setup(
        task=open_task(family.task, family.data),
        task_name=family.task,
        data=family.data,
        members=family.members,
        metric=family.metric,
        batch=family.batch,
    )
    for name, member, arm, before, steps, seed in order(family, config):
        # The rate depends on what the member starts from.
        rate = family.lr[member]
        if before is not None:
            rate = family.short_lr if ARMS[arm][0] == "random" else family.stage_lr[member]
        plan = CellPlan(
            cell=name, member=member, arm=arm, steps=steps, seed=seed, lr=config.lr or rate
        )
        if (plan.folder(folder) / "cell.json").exists():
            continue
        source = None if before is None else replace(plan, cell=before).folder(folder)
        cell = read_or_train_cell(setup, plan, folder, source)
        print(time.strftime("%H:%M:%S"), cell, flush=True)


def write(family: Family, config: StudyConfig, folder: Path, name: str) -> None:
    """Write the report of the cells that there are."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*/cell.json"))]
    cells = [Cell(**document) for document in documents if document["seed"] in config.seeds]
    if not cells:
        return print("no cells yet")

    # Tables, claims and the figure.
    sign = 1 if family.larger_is_better else -1
    names = list(family.members)
    out = Path(config.out)
    figures = draw_curve(cells, names[-1], family.metric, out / f"{name}.png")
    claims = paper_claims(cells, names, config.start, sign, family.gap)
    report = Report(
        package="com-pt", version=version("com-pt"), command=sys.argv, seeds=list(config.seeds),
        seconds=sum(cell.seconds for cell in cells),
        rows=[*cell_rows(cells, family.metric),
              *family_rows(cells, names, config.start, family.metric)],
        claims=claims,
        notes=[f"{family.batch} samples an update; a cosine for every run; AdamW "
               f"{rates_text(family.lr)} alone, {rates_text(family.stage_lr)} after growth, "
               f"{family.short_lr:g} for short runs from random weights",
               *target_notes(cells, names, config.start, sign, family.gap),
               "a seed varies initialisation and order of data; total GMAC counts all predecessors",
               "seconds are measured on a machine that other jobs used too"],
        environment=environment(("open-clip-torch", "timm", "transformers", "accelerate")),
    )  # fmt: skip

    # The JSON goes beside the figure, and its claims to the terminal.
    run_dir = folder / "report"
    run_dir.mkdir(exist_ok=True)
    write_report(report, run_dir, figures=figures)
    atomic_write(out / f"{name}.json", (run_dir / "report.json").read_text())
    for claim in report.to_json()["claims"]:
        print(claim["holds"], claim["text"], claim["value"], claim["stderr"])
    print(f"{time.strftime('%H:%M:%S')} {len(cells)} cells")
    return None


def rates_text(rates: dict[str, float]) -> str:
    """Return learning rates in words."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


if __name__ == "__main__":
    main()
