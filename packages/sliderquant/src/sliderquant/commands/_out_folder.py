"""What a folder of ``--out`` belongs to: one model, one text, one set of settings, finished or not."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.folders import check_same_settings
from effml_common.locking import LOCK
from effml_common.logging import jsonable, rank
from effml_common.report import Report, Row
from sliderquant.adapters.processes import wait_for_all
from sliderquant.adapters.weights import stored_tensors
from sliderquant.commands._job import Job
from sliderquant.config import SliderConfig
from sliderquant.method.parallel import process_count

IDENTITY = "run/settings.json"  # inside the out folder
CACHE = "cache"  # folder of hidden states inside ``run``
# What the result does not consist of, but what tells that everything else is there.
LAST_FILES = ("config.json", "run/report.json", "README.md")


def check_resumable(out: Path, resume: str) -> None:
    """Refuse a folder that holds something, unless it is a run that may go on.

    Raises:
        InputError: If it is not to be continued, or holds no run.
    """
    if rank() > 0 or _is_empty(out):
        return
    if resume == "never":
        raise InputError(f"{out} is not empty; choose another --out or add --resume auto")
    if not (out / IDENTITY).is_file():
        raise InputError(f"{out} holds no run to resume; choose another --out")


def _is_empty(out: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that is killed before it has begun."""
    run = (out / LOCK).parent
    names = [path for path in out.iterdir() if path != run] if out.exists() else []
    inside = list(run.iterdir()) if run.exists() else []
    return not names and all(
        path == out / LOCK or path.name == CACHE or (path.name[0] == "." and path.suffix == ".tmp")
        for path in inside
    )


def run_identity(job: Job) -> dict[str, Any]:
    """Return what the result of a run depends on, in JSON types: another one gives other bytes."""
    # Settings of the method and of the files.
    names = [field.name for field in fields(SliderConfig)]
    identity = {name: getattr(job.config, name) for name in (*names, "format", "container_bits")}

    # The model and the tokens; sums in another order end in other codes.
    config = job.opened.directory / "config.json"
    identity["model (sha256)"] = hash_of_files([config, *job.files])
    identity["calibration tokens (sha256)"] = hashlib.sha256(
        job.samples.numpy().tobytes()
    ).hexdigest()
    if job.config.parameters is not None:
        identity["parameters (sha256)"] = next(iter(job.calib_hashes.values()))
    identity |= {name: version(name) for name in ("sliderquant", "torch", "transformers")}
    identity |= {"processes": process_count(), "device": job.decoder.device.type}
    return jsonable(identity)


def hash_of_files(paths: Sequence[Path]) -> str:
    """Return one sha256 of the contents of files."""
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def claim_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Note what a folder belongs to, or see that it belongs to the same; for all processes.

    Raises:
        InputError: Naming a setting, the model or the text if it is another run's.
    """
    if (earlier := read_identity(out)) is not None:
        check_same_settings(earlier, identity, place=out)
    wait_for_all()  # before the first process writes what the others look for
    if rank() == 0 and earlier is None:
        write_identity(out, identity)
    wait_for_all()


def write_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """Note what a folder belongs to."""
    path = out / IDENTITY
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(jsonable(identity), indent=1) + "\n")


def read_identity(out: Path) -> dict[str, Any] | None:
    """Return what a folder belongs to; ``None`` if it does not say.

    Raises:
        InputError: If the file is damaged.
    """
    path = out / IDENTITY
    if not path.is_file():
        return None
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(identity, dict):
            raise ValueError
        return identity
    except ValueError:
        raise InputError(f"{path} is damaged; choose another --out") from None


def finished_report(out: Path) -> Report | None:
    """Return the report of a finished run, ``None`` of any other.

    Raises:
        InputError: If files of the result have been lost or damaged since.
    """
    if not all((out / name).is_file() for name in LAST_FILES):
        return None
    try:
        document = json.loads((out / "run" / "report.json").read_text(encoding="utf-8"))
        lost = [name for name in document["files"] if not (out / name).is_file()]
        document.pop("schema")
        rows = [
            Row(
                row["name"],
                row["setting"],
                {
                    name: [float(value) for value in metric["values"]]
                    for name, metric in row["metrics"].items()
                },
            )
            for row in document["rows"]
        ]
        report = Report(**{**document, "rows": rows, "claims": ()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # whatever it is, the run writes a new one

    # That it was finished once says nothing about what has become of its files.
    if lost:
        raise InputError(
            f"{out} is finished, but {lost[0]} is lost; restore it, or choose another --out"
        )
    stored_tensors(out)
    return report
