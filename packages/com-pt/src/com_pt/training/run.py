"""Runs a chain: grows each member from its predecessor, trains it, saves it, keeps the accounts."""

from pathlib import Path

import torch

from com_pt.adapters.accelerator import make_accelerator
from com_pt.method_config import ChainConfig
from com_pt.training.member import train_member
from com_pt.training.plan import Run, plan_stages
from com_pt.training.run_folder import Member, open_run_folder, save_member
from com_pt.training.tasks.base import Task
from com_pt.training.tasks.registry import open_task
from effml_common.logging import Sink, say
from effml_common.stopping import StopSignal


def run_chain(
    chain: ChainConfig,
    out: str | Path,
    *,
    task: Task | None = None,
    resume: bool = False,
    force: bool = False,
    device: torch.device | None = None,
    sink: Sink | None = None,
) -> list[Member]:
    """Train every member in turn.

    Args:
        chain: The chain.
        out: A finished member's folder per stage, as the host library loads it, and ``run``.
        task: The chain's task; by default the one that it names, with its data.
        resume: Go on where an interrupted run stopped, inside a stage or between two.
        force: Resume although settings have changed.
        device: Where to compute; None leaves the choice to accelerate.
        sink: Called with (step, metrics) of every logged step, for any tracker; ``metrics["stage"]``
            is the member's name, and steps begin at 1 in each stage.

    Returns:
        The members, from small to large.

    Raises:
        InputError: If the chain, its data or the out folder cannot be used.
        NonFiniteError: If a loss or gradient becomes NaN or infinite.
    """
    # Read the data and plan the stages; nothing is written for a chain that cannot be trained.
    task = open_task(chain.task, chain.data) if task is None else task
    stages = plan_stages(chain, task)

    # Prepare the processes and the folder; from here on a signal waits for a safe place.
    accelerator = make_accelerator(chain.precision, device)
    with StopSignal() as stop:
        run = Run(chain, task, Path(out), accelerator, resume, stop, sink)
        members = open_run_folder(run, force=force)
        say(
            f"{len(task)} training samples; batches of "
            f"{', '.join(str(stage.batch_size) for stage in chain.stages)} over "
            f"{accelerator.num_processes} processes"
        )

        # Train stage by stage; a finished one may have been the last thing before an interruption.
        for stage in stages[len(members) :]:
            model, member = train_member(stage, run)
            members.append(member)
            save_member(run, stage, model, members)
            del model  # the next stage reads it again, where it is needed
    return members
