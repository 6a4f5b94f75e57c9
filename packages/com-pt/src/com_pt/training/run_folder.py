"""The out folder of a run: a folder for each member, and ``run`` with all that tells of it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from com_pt.config import ChainConfig
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write

STATE, LEDGER, SETTINGS = "chain_state.json", "ledger.jsonl", "chain.json"


@dataclass(frozen=True)
class Member:
    """A finished member.

    Attributes:
        name: Of its stage.
        steps: Updates.
        samples: That it was trained on.
        macs: Of its training, predecessor included.
        seconds: Of its training, all runs together.
        metrics: Of ``Task.evaluate`` at the end.
        start: The same right after growth.
    """

    name: str
    steps: int
    samples: int
    macs: float
    seconds: float
    metrics: Mapping[str, float]
    start: Mapping[str, float]


def check_run_folder(chain: ChainConfig, out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds another run.

    Raises:
        ConfigError: If it holds a run that is not to be resumed, or one of other settings.
    """
    settings = out / "run" / SETTINGS
    if settings.exists():
        if not resume:
            raise ConfigError(f"{out} holds a run already; choose another --out, or --resume auto")
        earlier = json.loads(settings.read_text(encoding="utf-8"))
        if earlier["digest"] != chain.digest() and not force:
            raise ConfigError(
                f"the settings differ from those of {out}; resume with the same, or add --force"
            )


def create_run_folder(chain: ChainConfig, out: Path) -> None:
    """Write the settings of a run, and remove what an interrupted one left half-written."""
    for unfinished in out.glob(".tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    settings = out / "run" / SETTINGS
    settings.parent.mkdir(parents=True, exist_ok=True)
    document = {"digest": chain.digest(), **asdict(chain)}
    atomic_write(settings, json.dumps(document, indent=1, default=str) + "\n")


def finished_members(out: Path) -> list[Member]:
    """Read the members that an earlier run completed.

    Raises:
        InputError: If the files of one are not what was written.
    """
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


def publish_member(write: Callable[[Path], None], out: Path, name: str) -> None:
    """Write a member under another name first, so that its folder is complete or absent.

    Args:
        write: Writes the model into a folder that it creates.
        out: Out folder of the run.
        name: Of the member.
    """
    staging, target = out / f".tmp-{name}-{os.getpid()}", out / name
    shutil.rmtree(staging, ignore_errors=True)
    write(staging)
    if target.exists():  # left by a kill between this and the record of it
        shutil.rmtree(target)
    os.rename(staging, target)


def record_members(chain: ChainConfig, out: Path, members: Sequence[Member]) -> None:
    """Write which members are finished, with the hashes of their weights, and the ledger."""
    hashes = {member.name: _hash_weights(out / member.name) for member in members}
    entries = [asdict(member) for member in members]
    state = {"digest": chain.digest(), "sha256": hashes, "members": entries}
    atomic_write(out / "run" / STATE, json.dumps(state, indent=1) + "\n")
    lines = [json.dumps(entry) for entry in entries]
    atomic_write(out / "run" / LEDGER, "\n".join(lines) + "\n")


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
