"""The ``cache`` command: what the teacher's trunk would compute again in every epoch, kept on disk.

A cache holds K augmented views of each image: final tokens (half precision), prefix tokens at the
split, and the largest logits. The augmentation of an image in a view depends on (seed, view, index)
alone, so that training sees the very crop that the teacher saw. The tail still runs: it is needed for
gradients.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effml_common.errors import InputError
from scalekd.adapters.models import fingerprint
from scalekd.adapters.pairing import normalisation
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherOut
from scalekd.config import TrainConfig

MANIFEST = "manifest.json"


def pack(out: TeacherOut, top_k: int) -> dict[str, Tensor]:
    """One batch as it is kept, in main memory."""
    kept = {"tokens": out.tokens.half()}
    if out.context.prefix is not None and out.context.prefix.shape[1]:
        kept["prefix"] = out.context.prefix.half()
    if out.logits is not None:
        logits = out.logits.float()
        values, classes = logits.topk(min(top_k, logits.shape[-1]))
        kept |= {"logits": values, "classes": classes.int(), "mass": logits.logsumexp(-1)}
    return {name: value.cpu() for name, value in kept.items()}


def unpack_logits(kept: dict[str, Tensor], classes: int) -> Tensor:
    """Logits whose probabilities are the teacher's on the kept classes; the rest is spread evenly."""
    probabilities = (kept["logits"] - kept["mass"].unsqueeze(-1)).exp()
    missing = classes - probabilities.shape[-1]
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=1e-12) / max(1, missing)
    dense = rest.expand(-1, classes).scatter(1, kept["classes"].long(), probabilities)
    return dense.clamp(min=1e-30).log()


def teacher_out(kept: dict[str, Tensor], template: TeacherOut, classes: int) -> TeacherOut:
    """What the teacher made of a batch, from what was kept of it.

    Args:
        kept: As ``pack`` made it, on the device.
        template: Any pass of the teacher, for what does not depend on the image.
        classes: Of the teacher's head.
    """
    prefix = kept["prefix"].float() if "prefix" in kept else None
    if prefix is None and template.context.prefix is not None:
        prefix = template.context.prefix.expand(len(kept["tokens"]), -1, -1)
    return TeacherOut(
        logits=unpack_logits(kept, classes) if "logits" in kept else None,
        tokens=kept["tokens"].float(),
        grid=template.grid,
        split=template.split,
        context=dataclasses.replace(template.context, prefix=prefix),
    )


def identity(config: TrainConfig, task: ScaleKDTask, loader: Any) -> dict[str, str]:
    """What a cache depends on, by name, as hashes or plain words."""
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "teacher weights": fingerprint(task.split.model),
        "teacher resolution": str(task.teacher_size),
        "tail": f"{config.tail_blocks} blocks",
        "transform": str(loader.dataset.transform),
        "seed": str(config.seed),
        "images": f"{len(loader.dataset)} of {shape['dataset'] or 'folder'} {config.train_split}",
        "student normalisation": str(normalisation(task.export_student())),
    }


class TeacherCache:
    """Teacher outputs by index and view; see the module."""

    def __init__(self, folder: Path, task: ScaleKDTask, classes: int) -> None:
        self.folder, self.classes, self.device = folder, classes, task.device
        like = next(task.split.model.parameters())
        probe = torch.zeros(1, 3, *task.teacher_size, device=like.device, dtype=like.dtype)
        # The extra arguments of the tail do not depend on the image.
        self.template = task.split.forward(probe)
        self._view: tuple[int, dict[str, Tensor]] | None = None

    @staticmethod
    def views_of(folder: str) -> int:
        """How many views a cache has.

        Raises:
            InputError: If it is no cache.
        """
        return int(_manifest(Path(folder))["views"])

    @classmethod
    def open(cls, config: TrainConfig, task: ScaleKDTask, loader: Any) -> "TeacherCache":
        """Check that a cache was made for this very run.

        Raises:
            InputError: If it was not, or a shard is damaged.
        """
        folder = Path(config.cache or "")
        manifest = _manifest(folder)
        expected = identity(config, task, loader)
        differ = [
            name for name, value in expected.items() if manifest["made_for"].get(name) != value
        ]
        if differ:
            raise InputError(
                f"the cache {folder} was made with another {', '.join(differ)}; run scalekd cache "
                "with this run's settings"
            )
        for name, digest in manifest["files"].items():
            path = folder / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise InputError(f"shard {path} is missing or damaged; run scalekd cache again")
        return cls(folder, task, config.num_classes)

    def __call__(self, indices: Tensor, view: int) -> TeacherOut:
        """What the teacher made of some images in one view."""
        if self._view is None or self._view[0] != view:
            try:
                self._view = (view, load_file(self.folder / f"view-{view}.safetensors"))
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"view {view} of {self.folder} cannot be read: {error}; run again"
                ) from error
        kept = {k: v[indices].to(self.device) for k, v in self._view[1].items()}
        return teacher_out(kept, self.template, self.classes)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no cache of scalekd; make one with scalekd cache") from error
