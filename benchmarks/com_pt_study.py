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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from com_pt.study import (
    ARMS,
    Cell,
    claims_of,
    curve,
    family_rows,
    rows_of,
    target_notes,
    train_cell,
)
from com_pt.tasks.base import task_class
from com_pt.tasks.digits import pair_model
from effml_common.cli import COMMON_FLAGS, parse
from effml_common.files import atomic_write
from effml_common.report import Report, environment, write_report

PROG = "python benchmarks/com_pt_study.py"
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
        "com_pt.tasks.digits:DigitPairs", {},
        {"N": pair_model(32, 32), "T": pair_model(64, 64), "S": pair_model(128, 64),
         "B": pair_model(128, 64, 4)},
        batch=64, lr={"N": 4e-3, "T": 4e-3, "S": 2e-3, "B": 1e-3},
        stage_lr={"T": 4e-3, "S": 4e-3, "B": 1e-3}, short_lr=1e-3,
        alone=1600, stage={"T": 304, "S": 304, "B": 192}, longer=(480,),
        metric="zero-shot top-1", gap=0.005,
    ),
    "vit": Family(
        "com_pt.tasks.digit_images:DigitImages", {},
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
    out: str = field(default="benchmarks/results", metadata={"help": "folder of the results"})
    report: bool = field(default=False, metadata={"help": "only write the report"})


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in COMMON_FLAGS]
    config = parse(StudyConfig, words, prog=PROG, examples=EXAMPLES)
    torch.set_num_threads(1)
    family = FAMILIES[config.family]
    folder = Path(config.cells) / (config.family + (f"-lr{config.lr:g}" if config.lr else ""))
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(order(family, config))
    if not config.report:
        task = task_class(family.task)(family.data)
        for name, member, arm, before, steps, seed in wanted:
            train(family, config, folder, task, name, member, arm, before, steps, seed)
    write(family, config, folder)


def order(
    family: Family, config: StudyConfig
) -> Iterator[tuple[str, str, str, str | None, int, int]]:
    """(cell, member, arm, predecessor's cell, updates, seed), what later ones need first."""
    smallest, first, second, third = family.members
    for seed in config.seeds:
        yield f"{first} alone", first, "scratch", None, family.alone, seed
        for arm in config.arms:
            yield f"{second} {arm}", second, arm, f"{first} alone", family.stage[second], seed
    for seed in config.seeds:
        for arm in (arm for arm in config.arms if arm in LARGEST):
            before = f"{second} {config.start}"
            yield f"{third} {arm}", third, arm, before, family.stage[third], seed
        for member in (second, third):
            yield f"{member} alone", member, "scratch", None, family.alone, seed
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


def train(
    family: Family, config: StudyConfig, folder: Path, task: Any,
    name: str, member: str, arm: str, before: str | None, steps: int, seed: int,
) -> None:  # fmt: skip
    place = folder / f"{name.replace(' ', '_')}-{seed}"
    if (place / "cell.json").exists():
        return
    source = None if before is None else folder / f"{before.replace(' ', '_')}-{seed}"
    rate = family.lr[member]
    if before is not None:
        rate = family.short_lr if ARMS[arm][0] == "random" else family.stage_lr[member]
    cell = train_cell(
        task, family.task, family.data, family.members, place, source, name=name, member=member,
        arm=arm, steps=steps, seed=seed, metric=family.metric, batch=family.batch,
        lr=config.lr or rate,
    )  # fmt: skip
    print(time.strftime("%H:%M:%S"), cell, flush=True)


def write(family: Family, config: StudyConfig, folder: Path) -> None:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/cell.json"))]
    cells = [Cell(**cell) for cell in found if cell["seed"] in config.seeds]
    if not cells:
        return print("no cells yet")
    sign = 1 if family.larger_is_better else -1
    names = list(family.members)
    suffix = f"-lr{config.lr:g}" if config.lr else ""
    out = Path(config.out)
    figures = curve(cells, names[-1], family.metric, out / f"com-pt-{config.family}{suffix}.png")
    claims = claims_of(cells, names, config.start, sign, family.gap)
    report = Report(
        package="com-pt", version=version("com-pt"), command=sys.argv, seeds=list(config.seeds),
        seconds=sum(cell.seconds for cell in cells),
        rows=[*rows_of(cells, family.metric),
              *family_rows(cells, names, config.start, family.metric)],
        claims=claims,
        notes=[f"{family.batch} samples an update; a cosine for every run; AdamW "
               f"{told(family.lr)} alone, {told(family.stage_lr)} after growth, "
               f"{family.short_lr:g} for short runs from random weights",
               *target_notes(cells, names, config.start, sign, family.gap),
               "a seed varies initialisation and order of data; total GMAC counts all predecessors",
               "seconds are measured on a machine that other jobs used too"],
        environment=environment(("open-clip-torch", "timm", "transformers", "accelerate")),
    )  # fmt: skip
    run_dir = folder / "report"
    run_dir.mkdir(exist_ok=True)
    write_report(report, run_dir, figures=figures)
    text = (run_dir / "report.json").read_text()
    atomic_write(out / f"com-pt-{config.family}{suffix}.json", text)
    for claim in report.to_json()["claims"]:
        print(claim["holds"], claim["text"], claim["value"], claim["stderr"])
    print(f"{time.strftime('%H:%M:%S')} {len(cells)} cells")
    return None


def told(rates: dict[str, float]) -> str:
    """Rates in words."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


if __name__ == "__main__":
    main()
