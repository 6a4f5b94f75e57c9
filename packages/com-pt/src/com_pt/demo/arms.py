"""Ways to train a member of a family, and the training of one member in one of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from com_pt.method_config import ChainConfig, DepthRule, GrowthMode, StageConfig
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain
from com_pt.training.tasks.base import Task
from effml_common.files import atomic_write

FEATURE_WEIGHT = 1.953  # lambda of the released alpha = 500 at 512 channels
# How the member starts, and the weight of its feature loss.
ARMS: dict[str, tuple[GrowthMode, float]] = {
    "scratch": ("random", 0.0),
    "feature only": ("random", FEATURE_WEIGHT),
    "official": ("official", 0.0),
    "embed": ("embed", 0.0),
    "lossless": ("lossless", 0.0),
    "official + feature": ("official", FEATURE_WEIGHT),
    "embed + feature": ("embed", FEATURE_WEIGHT),
    "lossless + feature": ("lossless", FEATURE_WEIGHT),
}
# Every family is made deeper as the released code makes the image tower of CLIP deeper.
DEPTH: dict[GrowthMode, DepthRule] = {"official": "interleave"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trainings of a comparison share.

    Attributes:
        task: Data and models.
        task_name: The task's name in a chain file.
        data: The task's data settings.
        members: Model settings by name, from small to large.
        metric: Held-out metric that is compared.
        batch: Samples of an update.
        warmup_steps: Updates of the warm-up, at most a tenth of a training.
    """

    task: Task
    task_name: str
    data: Mapping[str, Any]
    members: Mapping[str, Any]
    metric: str
    batch: int
    warmup_steps: int = 50

    def stage(self, member: str, lr: float, **settings: Any) -> StageConfig:
        """Return the settings of a stage that trains, or takes, a member."""
        return StageConfig(
            name=member,
            model=self.members[member],
            batch_size=self.batch,
            lr=lr,
            warmup_steps=self.warmup_steps,
            **settings,
        )


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """One training of a comparison.

    Attributes:
        cell: Its name: member, and arm or place in a chain.
        member: Which model.
        arm: One of ``ARMS``.
        steps: How many updates it gets.
        seed: The seed of initialisation and order.
        lr: Peak learning rate.
        eval_every: Updates between evaluations within the training; 0 is none.
    """

    cell: str
    member: str
    arm: str
    steps: int
    seed: int
    lr: float
    eval_every: int = 0

    def folder(self, parent: Path) -> Path:
        """Return the folder of this cell in that of all cells."""
        return parent / f"{self.cell}-{self.seed}".replace(" ", "_")


@dataclass(frozen=True)
class Cell:
    """One member, trained in one way with one seed.

    Attributes:
        cell: Its name: member, and arm or place in a chain.
        member: Which model.
        arm: One of ``ARMS``.
        seed: The seed of initialisation and order.
        steps: How many updates it gets.
        value: Held-out metric at the end.
        start: The same right after growth.
        macs: What this training cost.
        total_macs: What it and all that it was grown from cost together.
        seconds: How long this training took.
        forward: MACs of a sample's forward pass.
    """

    cell: str
    member: str
    arm: str
    seed: int
    steps: int
    value: float
    start: float | None
    macs: float
    total_macs: float
    seconds: float
    forward: int


def train_cell(
    setup: Setup,
    plan: CellPlan,
    folder: Path,
    source: Path | None,
    device: torch.device | None = None,
) -> Cell:
    """Train one member in one way.

    Args:
        setup: What all cells share.
        plan: What this one is.
        folder: Where it is kept.
        source: Folder of the finished cell that the member is grown from; None without one.
        device: Where to compute; None leaves the choice to accelerate.
    """
    # The chain has one or two members, of which the first is finished.
    mode, weight = ARMS[plan.arm]
    stages = []
    macs_before = 0.0
    if source is not None:
        small = json.loads((source / "cell.json").read_text(encoding="utf-8"))
        start = str(source / "run" / small["member"])
        stages.append(setup.stage(small["member"], plan.lr, init_from=start))
        macs_before = small["total_macs"] if plan.arm != "scratch" else 0.0
    epochs = plan.steps / (len(setup.task) // setup.batch)
    stages.append(
        setup.stage(
            plan.member,
            plan.lr,
            epochs=epochs,
            growth=mode,
            depth=DEPTH.get(mode),
            feature_weight=weight,
        )
    )

    # Train; an interrupted cell goes on where it was.
    chain = ChainConfig(
        task=setup.task_name,
        data=setup.data,
        stages=tuple(stages),
        seed=plan.seed,
        individual_epochs=epochs,
        eval_every=plan.eval_every,
    )
    *_, member = run_chain(
        chain, folder / "run", task=setup.task, resume=True, force=True, device=device
    )

    # Keep what is compared.
    cell = Cell(
        cell=plan.cell,
        member=plan.member,
        arm=plan.arm,
        seed=plan.seed,
        steps=member.steps,
        value=member.metrics[setup.metric],
        start=member.start.get(setup.metric),
        macs=member.macs,
        total_macs=macs_before + member.macs,
        seconds=member.seconds,
        forward=plan_chain(chain, setup.task).stages[-1].forward,
    )
    atomic_write(folder / "cell.json", json.dumps(asdict(cell)) + "\n")
    return cell


def read_or_train_cell(
    setup: Setup,
    plan: CellPlan,
    parent: Path,
    source: Path | None,
    device: torch.device | None = None,
) -> Cell:
    """Return a cell that is kept in the folder ``parent``, or train it into a folder there."""
    folder = plan.folder(parent)
    finished = folder / "cell.json"
    if finished.exists():
        return Cell(**json.loads(finished.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    return train_cell(setup, plan, folder, source, device)
