"""``com-pt train``: train a chain from one YAML file."""

from dataclasses import replace

import torch

from com_pt.config import TrainConfig
from com_pt.method.cost import StageCost
from com_pt.method_config import ChainConfig
from com_pt.training.chain import load_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain
from com_pt.training.run_folder import Member
from com_pt.training.tasks.registry import open_task
from effml_common.device import resolve_device
from effml_common.folders import run_folder
from effml_common.logging import load_sink, say
from effml_common.report import Report, ReportBuilder, Row, write_report

LIBRARIES = ("open-clip-torch", "timm", "transformers", "accelerate")
# Endings of retrieval metrics that stay in the ledger: they are too many for a table.
NOT_SHOWN = ("R@5", "R@10", "rank")


def train(config: TrainConfig) -> Report:
    """Train a chain."""
    device = resolve_device(config.device)
    chain = with_overrides(load_chain(config.chain), config)
    return train_and_report(config, chain, "train", device)


def with_overrides(chain: ChainConfig, config: TrainConfig) -> ChainConfig:
    """Return the chain with what the command line replaces."""
    # Paths of data belong to the section "data" of the chain file.
    data = dict(chain.data)
    for name, value in (("train", config.train_data), ("val", config.val_data)):
        if value is not None:
            data[name] = value

    # The other settings are the chain's own.
    replaced = {
        name: value
        for name in ("precision", "accum_freq", "grad_checkpointing")
        if (value := getattr(config, name)) is not None
    }
    return replace(chain, data=data, **replaced)


def train_and_report(
    config: TrainConfig, chain: ChainConfig, command: str, device: torch.device
) -> Report:
    """Train a chain into its out folder and write the report of its members.

    Args:
        config: Where to write, and whether to resume.
        chain: The chain with all overrides.
        command: Verb that the default out folder is named for.
        device: Where to compute.
    """
    # Train.
    builder = ReportBuilder("com-pt", LIBRARIES)
    out = run_folder(config.out, command)
    task = open_task(chain.task, chain.data)
    members = run_chain(
        chain,
        out,
        task=task,
        resume=config.resume == "auto",
        force=config.force,
        device=device,
        sink=load_sink(config.sink),
    )

    # Report each member beside its plan.
    planned = plan_chain(chain, task)
    report = builder.build(
        [_row(member, stage) for member, stage in zip(members, planned.stages, strict=True)],
        seeds=[chain.seed],
        device=device,
        notes=[f"planned: every member alone costs {planned.ratio:.2f} times as much"],
        files=[member.name for member in members],
    )
    write_report(report, out / "run")
    say(f"members: {', '.join(str(out / member.name) for member in members)}")
    return report


def _row(member: Member, stage: StageCost) -> Row:
    shown = {name: [v] for name, v in member.metrics.items() if not name.endswith(NOT_SHOWN)}
    costs = {"GMAC": [member.macs / 1e9], "seconds": [member.seconds]}
    setting = f"{member.steps} updates, {stage.epochs:g} epochs"
    return Row(member.name, setting, {**shown, **costs})
