"""Checkpoints that survive kill -9, a full disk and flipped bits, and continue a run bit for bit.

A checkpoint is a folder ``step-<n>`` of ``model.safetensors``, ``trainer.pt`` (readable with
``weights_only=True``), ``config.json`` and ``manifest.json`` with the sha256 of the others. It is
written as ``.tmp-<n>-<pid>`` and renamed when complete: its name exists only if it is whole.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effml_common.errors import CheckpointError
from effml_common.files import fsync_path
from effml_common.logging import jsonable, rank, warn
from effml_common.parsing import one_line

FORMAT = 1
_TENSORS, _STATE, _CONFIG = _FILES = ("model.safetensors", "trainer.pt", "config.json")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors on the CPU, the trainer's state, the run's config."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]
    path: Path


def save(
    root: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``root/step-<step>`` and then remove all but ``keep`` good ones (only rank 0).

    The parent of ``root`` must exist, so that a lost disk is noticed. The tensors may be on any
    device; tied ones are stored twice. The state holds numbers, strings, tensors, and dicts and
    lists of them; the config, types that ``jsonable`` knows.

    Raises:
        CheckpointError: If the step exists, the state holds other types, or the disk fails;
            earlier checkpoints are then untouched.
    """
    root = Path(root)
    target, staging = root / f"step-{step}", root / f".tmp-{step}-{os.getpid()}"
    if rank() > 0:
        return target
    if keep < 1 or step < 0:
        raise CheckpointError(f"keep is {keep}, step {step}; give keep >= 1 and step >= 0")

    # Under another name until it is complete and on the disk.
    try:
        root.mkdir(exist_ok=True)
        _make_way(target)
        staging.mkdir()
        _write(staging, step, tensors, state, config or {})
        os.rename(staging, target)
        fsync_path(root)
        verify(target)
    except Exception as error:  # torch and safetensors have their own errors for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        why = f"cannot save step {step} in {root}: {one_line(error)}"
        remedy = "earlier ones are untouched, so correct this and run again with --resume auto"
        raise CheckpointError(f"{why}; {remedy}") from error

    # Only now, with the new one verified, are older ones dispensable.
    _prune(root, step, keep)
    return target


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read one checkpoint, after its checksums have been verified.

    Raises:
        CheckpointError: If a file is missing, damaged, or holds anything but plain data.
    """
    path = Path(path)
    step = verify(path)
    try:
        tensors = load_file(path / _TENSORS)
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except MemoryError:
        raise
    except Exception as error:  # whatever the bytes make the readers do, they are no checkpoint
        raise CheckpointError(f"{path} is refused: {_reason(error)}; delete it") from error
    return Checkpoint(step, tensors, state, config, path)


def latest(root: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest checkpoint that can be trusted; a warning names each newer one that cannot."""
    for step in _steps(Path(root)):
        try:
            return load(Path(root) / f"step-{step}")
        except CheckpointError as error:
            warn(f"skipped: {error}")
    return None


def verify(path: Path) -> int:
    """The step of a checkpoint; raises CheckpointError if a file is not the one that was written."""
    try:
        raw = (path / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
        digest, step = manifest.pop("sha256"), manifest["step"]

        # The manifest must be, byte for byte, what its own content makes.
        sound = raw == _manifest_bytes(manifest) and path.name == f"step-{step}"
        if not (sound and digest and manifest["format"] == FORMAT):
            raise ValueError(f"{_MANIFEST} is not the one that was written")
        for name in _FILES:
            if _fingerprint(path / name) != manifest["files"][name]:
                raise ValueError(f"{name} is not the one that was written")
        return step
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{path} is damaged: {reason}; use an earlier step") from error


def training_state(
    model: nn.Module, optimizer: Any, scheduler: Any = None, **extra: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a training run, two arguments of ``save``.

    ``extra`` is what else the loop needs: the loader's position, states of other generators.
    """
    schedule = None if scheduler is None else scheduler.state_dict()
    state = {"optimizer": optimizer.state_dict(), "scheduler": schedule, "rng": rng_state()}
    return model.state_dict(), {**state, "extra": extra}


def restore_training_state(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Any, scheduler: Any = None
) -> dict[str, Any]:
    """Put everything back in place that ``training_state`` took; returns its ``extra``.

    Raises:
        CheckpointError: If the checkpoint belongs to another model, optimizer or kind of run.
    """
    try:
        model.load_state_dict(checkpoint.tensors)
        optimizer.load_state_dict(checkpoint.state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(checkpoint.state["scheduler"])
        set_rng_state(checkpoint.state["rng"])
        return checkpoint.state["extra"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{checkpoint.path} does not fit this run: {one_line(error)}"
        remedy = "resume with the settings it was made with, or choose another --out"
        raise CheckpointError(f"{why}; {remedy}") from error


def rng_state() -> dict[str, Any]:
    """States of the python, numpy (if imported), torch and CUDA generators, as plain data.

    CUDA's belong to it only if this process has used CUDA: a run on the CPU must not wake the cards,
    and a forked loading process, which may not touch them, has the host's generators alone.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss]}
    state["torch"] = torch.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back where ``rng_state`` found them; warns if the cards are others."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import_module("numpy").random.set_state(tuple(state["numpy"]))

    # Cards have their generators only in a process that uses them.
    saved = state.get("cuda", [])
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    if len(saved) != devices:
        change = f"saved with {len(saved)} CUDA devices, now {devices}"
        warn(f"{change}: the run will not repeat exactly")
    for device, one in zip(range(devices), saved, strict=False):
        torch.cuda.set_rng_state(one, device)


def sweep(root: str | os.PathLike[str]) -> None:
    """Remove what processes that no longer live left half written."""
    for path in Path(root).glob(".tmp-*-*"):
        pid = path.name.rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, OverflowError, ValueError):
            continue  # alive, or not ours


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Any, config: Any) -> None:
    with open(folder / _CONFIG, "w", encoding="utf-8") as file:
        json.dump(jsonable(config), file, indent=1)
    save_file(_separate(tensors), folder / _TENSORS)
    # safetensors makes its file private; give it the mode that the umask gave to its neighbour.
    os.chmod(folder / _TENSORS, (folder / _CONFIG).stat().st_mode & 0o777)
    with open(folder / _STATE, "wb") as file:
        torch.save(dict(state), file)

    # torch writes what it would later refuse to load; the time to notice is now.
    try:
        torch.load(folder / _STATE, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        why = f"step {step} is not saved: its state would not load again: {_reason(error)}"
        remedy = "keep numbers, strings, tensors, and lists and dicts of them in it"
        raise CheckpointError(f"{why}; {remedy}") from error

    # The manifest is written last, of files that are complete.
    libraries = {name: metadata.version(name) for name in ("torch", "safetensors")}
    files = {name: _fingerprint(folder / name) for name in _FILES}
    manifest = {"format": FORMAT, "step": step, "files": files, "libraries": libraries}
    (folder / _MANIFEST).write_bytes(_manifest_bytes(manifest))
    for name in (*_FILES, _MANIFEST, "."):
        fsync_path(folder / name)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as the format wants; tied weights are copied."""
    result = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages: set[int] = set()
    for name, tensor in result.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return result


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1).encode()


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}


def _reason(error: Exception) -> str:
    # torch advises to allow the class by hand, which would be wrong here; only name it.
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds {found[1]}, not plain data" if found else one_line(error)


def _steps(root: Path) -> list[int]:
    found = [re.fullmatch(r"step-(0|[1-9]\d*)", path.name) for path in root.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def _make_way(target: Path) -> None:
    """A good checkpoint is never overwritten; a damaged one is put aside for a resumed run."""
    sweep(target.parent)
    if not target.exists():
        return
    try:
        verify(target)
    except CheckpointError as error:
        aside = target.with_name(f"{target.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        warn(f"{error}; it is now {aside.name}")
    else:
        raise CheckpointError(f"{target} exists already; choose another --out, or --resume auto")


def _prune(root: Path, step: int, keep: int) -> None:
    kept = 1  # the new one, which has been verified
    for older in [number for number in _steps(root) if number < step]:
        try:
            if kept < keep:
                verify(root / f"step-{older}")
                kept += 1
            else:
                # Renamed first: a kill in the middle must not leave half of it under its name.
                doomed = root / f".tmp-{older}-{os.getpid()}"
                os.rename(root / f"step-{older}", doomed)
                shutil.rmtree(doomed)
        except CheckpointError:
            continue  # a damaged one is neither counted nor removed
        except OSError as error:
            warn(f"the old checkpoint step-{older} could not be removed: {error.strerror}")
