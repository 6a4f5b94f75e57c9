"""Safetensors shards of a model that is never in memory as a whole.

Tensors arrive in pieces. A piece is a safetensors file in a staging folder, written under another name,
synced and renamed; a journal lists those that are complete. In the end pieces are joined, byte by byte,
into shards of bounded size. A process that is killed anywhere leaves only complete files, and the next
one goes on.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from effml_common.errors import InputError
from effml_common.files import atomic_write, fsync_path, naming
from sliderquant.adapters.reasons import reason_of

STAGING = ".export"
SHARD_BYTES = 5 * 10**9  # largest file, the limit that transformers' own writer used for years
_JOURNAL = "journal.json"


class ShardWriter:
    """Writes tensors piece by piece, and joins the pieces at the end.

    Args:
        out: Folder of the result; must hold no model yet.
        stem: Of the final names: ``model`` makes ``model.safetensors`` or
            ``model-00001-of-00003.safetensors``.
        identity: What the result depends on, as JSON; an unfinished export is continued only if it
            has the same.
        shard_bytes: Largest file, unless one tensor is larger.

    Raises:
        InputError: If ``out`` holds a model, or the unfinished export of another one.
    """

    def __init__(
        self, out: Path, stem: str, identity: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.out, self.staging = out, out / STAGING
        self._stem, self._limit = stem, shard_bytes
        identity = json.loads(json.dumps(identity))
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give a folder for --out")

        # An earlier export of the same identity goes on; any other model is left alone.
        journal = _read_journal(self.staging / _JOURNAL)
        if journal is None:
            if (out / "config.json").exists() or any(out.glob("*.safetensors")):
                raise InputError(f"{out} holds a model already; choose another --out")
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            journal = {"identity": identity, "pieces": [], "notes": {}}
        elif journal["identity"] != identity:
            raise InputError(
                f"{out} holds the unfinished export of another model or format; "
                f"remove {self.staging} or choose another --out"
            )
        self._journal = journal

    @property
    def notes(self) -> dict[str, Any]:
        """What the caller noted beside the pieces, by key."""
        return dict(self._journal["notes"])

    def add(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write tensors to disk, and note ``notes`` once they are there.

        Args:
            tensors: By their final names.
            notes: JSON by key.

        Raises:
            OSError: If the disk is full or gone; earlier pieces are complete.
        """
        for part in _parts(tensors, self._limit):
            name = f"piece-{len(self._journal['pieces']):05d}.safetensors"
            self._save(part, name)
            sizes = {key: tensor.nbytes for key, tensor in part.items()}
            self._journal["pieces"].append({"file": name, "sizes": sizes})
        self._journal["notes"].update(json.loads(json.dumps(notes)))
        atomic_write(self.staging / _JOURNAL, json.dumps(self._journal))

    def _save(self, tensors: Mapping[str, Tensor], name: str) -> None:
        temporary = self.staging / f".{name}.tmp"
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except Exception as error:  # safetensors has its own error for a full disk
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(*_errno(error), str(self.staging / name)) from error
        fsync_path(temporary)
        temporary.replace(self.staging / name)
        fsync_path(self.staging)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors written so far."""
        return frozenset(name for piece in self._journal["pieces"] for name in piece["sizes"])

    def join(self) -> list[str]:
        """Turn the pieces into shards and an index under their final names; returns the file names.

        May be called again after an interruption: shards that are there are complete.
        """
        # One shard per group; a single one has no number.
        groups = self._groups()
        index: dict[str, str] = {}
        files = []
        for number, group in enumerate(groups, start=1):
            name = f"{self._stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            name = name if len(groups) > 1 else f"{self._stem}.safetensors"
            if not (self.out / name).exists():
                self._join_group([piece["file"] for piece in group], name)
            for piece in group:
                (self.staging / piece["file"]).unlink(missing_ok=True)
                index |= dict.fromkeys(piece["sizes"], name)
            files.append(name)

        # Several shards need an index, in the layout of transformers.
        if len(groups) > 1:
            total = sum(sum(piece["sizes"].values()) for group in groups for piece in group)
            document = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(index.items())),
            }
            name = f"{self._stem}.safetensors.index.json"
            atomic_write(self.out / name, json.dumps(document, indent=2) + "\n")
            files.append(name)
        return files

    def finish(self) -> None:
        """Remove the staging folder: the model is complete."""
        shutil.rmtree(self.staging)

    def _groups(self) -> list[list[dict[str, Any]]]:
        """Return neighbouring pieces that fit into one shard."""
        groups: list[list[dict[str, Any]]] = []
        free = -1
        for piece in self._journal["pieces"]:
            size = sum(piece["sizes"].values())
            if size > free or not groups:
                groups.append([])
                free = self._limit
            groups[-1].append(piece)
            free -= size
        return groups

    def _join_group(self, pieces: list[str], name: str) -> None:
        temporary = self.staging / f".{name}.tmp"
        if len(pieces) == 1:
            temporary = self.staging / pieces[0]
        else:
            join_files([self.staging / piece for piece in pieces], temporary)
            fsync_path(temporary)
        temporary.chmod(_default_mode(self.staging))
        temporary.replace(self.out / name)
        fsync_path(self.out)


def join_files(sources: list[Path], target: Path) -> None:
    """Join safetensors files with different names in them into one, a buffer at a time."""
    # Where each tensor lies: (name, header entry, file, first byte, bytes).
    entries = []
    for source in sources:
        with source.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            entries.append((name, entry, source, 8 + length + begin, end - begin))

    # As safetensors itself orders them: wide types first, so that every tensor lies aligned.
    entries.sort(key=lambda e: (-_width(e[1]["dtype"]), e[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry, _, _, size in entries:
        header[name] = {**entry, "data_offsets": [offset, offset + size]}
        offset += size

    # A header whose length is a multiple of 8, then the tensors.
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with naming(target), target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, _, source, begin, size in entries:
            with source.open("rb") as file:
                file.seek(begin)
                _copy(file, out, size)


def _copy(source: BinaryIO, target: BinaryIO, size: int, buffer: int = 2**24) -> None:
    while size:
        block = source.read(min(size, buffer))
        if not block:
            raise OSError("a piece of the export is shorter than its header says")
        target.write(block)
        size -= len(block)


def _parts(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = []
    free = -1
    for name, tensor in tensors.items():
        if tensor.nbytes > free or not parts:
            parts.append({})
            free = limit
        parts[-1][name] = tensor
        free -= tensor.nbytes
    return parts


def _width(dtype: str) -> int:
    """Return the bytes per element of a safetensors dtype such as ``BF16`` or ``I64``."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def _read_journal(path: Path) -> dict[str, Any] | None:
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        if {"identity", "pieces", "notes"} != set(journal):
            raise ValueError
        return journal
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; remove {path.parent} and run again") from None


def _default_mode(folder: Path) -> int:
    """Return the mode of a new file under this umask, as the journal has it; safetensors sets 0600."""
    return (folder / _JOURNAL).stat().st_mode & 0o777


def _errno(error: Exception) -> tuple[int, str]:
    """Return the code of the system's error that safetensors names in its text, and that text."""
    import errno
    import re

    match = re.search(r"os error (\d+)", str(error))
    code = int(match[1]) if match else errno.EIO
    return code, reason_of(error)
