"""The plan of a run: its stages in order, what each costs, and whether the members ascend."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from com_pt.errors import ChainOrderError
from com_pt.method.cost import ChainCost, StageCost
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.tasks.base import Task
from com_pt.training.tasks.registry import open_task
from effml_common.errors import InputError
from effml_common.logging import Sink
from effml_common.stopping import StopSignal


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        chain: Settings of the chain.
        task: Its data and models.
        out: Folder of the members, and of ``run``.
        accelerator: An ``accelerate.Accelerator``.
        resume: Whether an interrupted run goes on.
        stop: Signals that ask the run to stop.
        sink: Gets (step, metrics) of every logged step, with the ``stage``.
    """

    chain: ChainConfig
    task: Task
    out: Path
    accelerator: Any
    resume: bool
    stop: StopSignal
    sink: Sink | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        number: Its place in the chain, from 1.
        settings: Settings of the member.
        predecessor: Settings of the member before it; None for the first.
        cost: MACs of a sample, and epochs.
        is_last: Whether no other member is grown from it.
    """

    number: int
    settings: StageConfig
    predecessor: StageConfig | None
    cost: StageCost
    is_last: bool


def plan_chain(chain: ChainConfig, task: Task | None = None) -> ChainCost:
    """Compute what a chain costs, from its models' shapes alone.

    Args:
        chain: The chain.
        task: The chain's task; by default the one that it names. Its data are not read.

    Example:
        >>> from com_pt.training.chain import load_chain
        >>> cost = plan_chain(load_chain("cc3m-vit-tsbl"))
        >>> f"{cost.ratio:.2f} times cheaper than four separate trainings"
        '5.70 times cheaper than four separate trainings'
    """
    return _chain_cost(chain, open_task(chain.task, chain.data) if task is None else task)


def plan_stages(chain: ChainConfig, task: Task) -> list[StagePlan]:
    """Plan the stages of a run, and refuse a chain that cannot be trained.

    Args:
        chain: The chain.
        task: The chain's task, which takes the sizes of its data from the models where they are not set.

    Raises:
        InputError: If there are no data.
        ConfigError: If models and data settings differ.
        ChainOrderError: If the members do not ascend.
    """
    # Data are made for the models; where image sizes grow, for the last one.
    sized = chain.stages[-1:] if chain.resize_pos else chain.stages
    task.adopt({stage.name: stage.model for stage in sized})
    task.check_data()
    if len(task) == 0:
        raise InputError("there are no training data; give some under data: train")

    # Every member is larger than the one before it.
    check_order(
        [stage.name for stage in chain.stages],
        [_count_parameters(task, stage) for stage in chain.stages],
    )

    # What each stage costs, and what it is grown from.
    cost = _chain_cost(chain, task)
    return [
        StagePlan(
            number=i + 1,
            settings=stage,
            predecessor=chain.stages[i - 1] if i > 0 else None,
            cost=cost.stages[i],
            is_last=i == len(chain.stages) - 1,
        )
        for i, stage in enumerate(chain.stages)
    ]


def check_order(names: list[str], sizes: list[int]) -> None:
    """Refuse members that do not ascend.

    Args:
        names: The members' names, in the chain's order.
        sizes: Their numbers of parameters.

    Raises:
        ChainOrderError: Naming the first pair that does not.
    """
    for i in range(1, len(names)):
        if sizes[i] < sizes[i - 1]:
            raise ChainOrderError(
                f"{names[i]} has {sizes[i]:,} parameters, fewer than {names[i - 1]} with "
                f"{sizes[i - 1]:,}; order the chain from small to large"
            )


def _count_parameters(task: Task, stage: StageConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in task.build(stage.model).parameters())


def _chain_cost(chain: ChainConfig, task: Task) -> ChainCost:
    macs = [task.macs(stage.model) for stage in chain.stages]
    stages = [
        StageCost(
            stage.name,
            macs[i],
            macs[i - 1] if i > 0 and stage.feature_weight > 0 else 0,
            0 if stage.init_from else chain.epochs_of(i),
        )
        for i, stage in enumerate(chain.stages)
    ]
    return ChainCost(stages, chain.individual_epochs)
