"""The out folder of a run: a folder for each member, and ``run`` with all that tells of it."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from com_pt.method_config import ChainConfig
from com_pt.training.plan import Run, StagePlan
from effml_common.errors import CheckpointError, ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.folders import check_out_folder, check_same_settings

STATE, LEDGER, SETTINGS = "chain_state.json", "ledger.jsonl", "chain.json"


@dataclass(frozen=True)
class Member:
    """A finished member.

    Attributes:
        name: The name of its stage.
        steps: How many updates it got.
        samples: How many samples it was trained on.
        macs: What its training cost, with the predecessor's forward passes.
        seconds: How long it was trained, all runs together.
        metrics: What ``Task.evaluate`` returned at the end.
        start: The same right after growth.
    """

    name: str
    steps: int
    samples: int
    macs: float
    seconds: float
    metrics: Mapping[str, float]
    start: Mapping[str, float]


def open_run_folder(run: Run, *, force: bool) -> list[Member]:
    """Prepare the folder of a run, and return the members that are finished.

    Args:
        run: Its chain, out folder and processes.
        force: Resume although settings have changed.

    Raises:
        InputError: If the folder holds another run, or members that are not what was written.
    """
    # A slower process must not find what the first one writes.
    _check_folder(run.chain, run.out, resume=run.resume, force=force)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        _create_folder(run.chain, run.out)
    run.accelerator.wait_for_everyone()
    return _read_members(run.out) if run.resume else []


def _check_folder(chain: ChainConfig, out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds another run."""
    check_out_folder(out, [f"run/{SETTINGS}"], resume=resume)
    settings = out / "run" / SETTINGS
    if force or not settings.exists():
        return
    earlier = json.loads(settings.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(chain), default=str))
    try:
        check_same_settings(_flat_settings(earlier), _flat_settings(now), place=out)
    except CheckpointError as error:
        raise ConfigError(f"{error}, or add --force") from None


def _flat_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings of stages one by one, so that a message can name the one that differs."""
    settings = {k: v for k, v in document.items() if k not in ("digest", "stages")}
    for stage in document["stages"]:
        settings |= {f"{name} of {stage['name']}": value for name, value in stage.items()}
    return settings


def _create_folder(chain: ChainConfig, out: Path) -> None:
    """Write the settings of a run, and remove what an interrupted one left half-written."""
    for unfinished in out.glob(".tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    settings = out / "run" / SETTINGS
    settings.parent.mkdir(parents=True, exist_ok=True)
    document = {"digest": chain.digest(), **asdict(chain)}
    atomic_write(settings, json.dumps(document, indent=1, default=str) + "\n")


def _read_members(out: Path) -> list[Member]:
    """Read the members that an earlier run completed, if their files are what was written."""
    path = out / "run" / STATE
    if not path.exists():
        return []
    state = json.loads(path.read_text(encoding="utf-8"))
    members = []
    for entry in state["members"]:
        if _hash_weights(out / entry["name"]) != state["sha256"][entry["name"]]:
            raise InputError(
                f"{out / entry['name']} is not what was written; remove it and {path} to train it again"
            )
        members.append(Member(**entry))
    return members


def save_member(run: Run, stage: StagePlan, model: nn.Module, members: Sequence[Member]) -> None:
    """Write a member's model, and then the record that it is finished.

    Args:
        run: The run that this member belongs to.
        stage: The member's plan.
        model: Its finished model.
        members: All finished members, this one last.
    """
    if run.accelerator.is_main_process:
        _publish_model(run, stage, model)
        _record_members(run.chain, run.out, members)
    run.accelerator.wait_for_everyone()


def _publish_model(run: Run, stage: StagePlan, model: nn.Module) -> None:
    """Write a model under another name first, so that its folder is complete or absent."""
    name = stage.settings.name
    staging, target = run.out / f".tmp-{name}-{os.getpid()}", run.out / name
    shutil.rmtree(staging, ignore_errors=True)
    run.task.save(model, stage.settings.model, staging)
    if target.exists():  # left by a kill between this and the record of it
        shutil.rmtree(target)
    os.rename(staging, target)


def _record_members(chain: ChainConfig, out: Path, members: Sequence[Member]) -> None:
    """Write which members are finished, with the hashes of their weights, and the ledger."""
    # Earlier members were hashed when they were recorded, or when this run was resumed.
    known = _read_hashes(out)
    hashes = {m.name: known[m.name] for m in members[:-1]}
    hashes[members[-1].name] = _hash_weights(out / members[-1].name)
    entries = [asdict(member) for member in members]
    state = {"digest": chain.digest(), "sha256": hashes, "members": entries}
    atomic_write(out / "run" / STATE, json.dumps(state, indent=1) + "\n")
    lines = [json.dumps(entry) for entry in entries]
    atomic_write(out / "run" / LEDGER, "\n".join(lines) + "\n")


def _read_hashes(out: Path) -> dict[str, str]:
    path = out / "run" / STATE
    return json.loads(path.read_text(encoding="utf-8"))["sha256"] if path.exists() else {}


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
