"""What the teacher's trunk would compute again in every epoch, kept on disk.

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
from torch import Tensor, nn

from effml_common.errors import InputError
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherOut
from scalekd.training.plan import TrainingPlan

MANIFEST = "manifest.json"
SMALLEST_SHARE = 1e-12  # of probability left to the classes whose logits were not kept
SMALLEST_PROBABILITY = 1e-30  # of one class, so that its logarithm is finite


def count_views(folder: str | None) -> int | None:
    """Return how many views a cache has; None without a cache.

    Raises:
        InputError: If the folder is no cache.
    """
    return int(_read_manifest(Path(folder))["views"]) if folder else None


def open_cache(plan: TrainingPlan, task: ScaleKDTask, images: Any) -> "TeacherCache | None":
    """Open the cache of a run, after a check that it was written for this very run.

    Args:
        plan: Names the cache.
        task: Teacher and student as they are before the first update.
        images: Data set with the transform that the loader has set.

    Returns:
        None without ``--cache``.

    Raises:
        InputError: If it was written for another run, or a shard is damaged.
    """
    if not plan.config.cache:
        return None
    folder = Path(plan.config.cache)
    manifest = _read_manifest(folder)

    # Whatever the kept outputs depend on must be the same.
    expected = identify(plan, task, images)
    differing = [name for name, v in expected.items() if manifest["made_for"].get(name) != v]
    if differing:
        raise InputError(
            f"the cache {folder} was made with another {', '.join(differing)}; run scalekd cache "
            "with this run's settings"
        )

    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise InputError(f"shard {path} is missing or damaged; run scalekd cache again")
    return TeacherCache(folder, task, plan.config.num_classes)


def identify(plan: TrainingPlan, task: ScaleKDTask, images: Any) -> dict[str, str]:
    """Return what a cache depends on, by name, as hashes or plain words."""
    config = plan.config
    return {
        "teacher weights": _hash_weights(task.split.model),
        "teacher resolution": str(task.images.teacher_size),
        "tail": f"{config.tail_blocks} blocks",
        "transform": str(images.transform),
        "seed": str(config.seed),
        "images": f"{len(images)} of {config.dataset or 'folder'} {config.train_split}",
        "student normalisation": str(task.images.student_pixels),
    }


def _hash_weights(model: nn.Module) -> str:
    """SHA-256 hash of a model's weights and buffers, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


class TeacherCache:
    """Teacher outputs by index and view; see the module.

    Args:
        folder: What ``scalekd cache`` wrote.
        task: Its teacher and its device.
        classes: Of the teacher's head.
    """

    def __init__(self, folder: Path, task: ScaleKDTask, classes: int) -> None:
        self.folder, self.classes, self.device = folder, classes, task.device
        weight = next(task.split.model.parameters())
        probe = torch.zeros(
            1, 3, *task.images.teacher_size, device=weight.device, dtype=weight.dtype
        )
        # The extra arguments of the tail do not depend on the image.
        self.template = task.split.forward(probe)
        self._view: tuple[int, dict[str, Tensor]] | None = None

    def __call__(self, indices: Tensor, view: int) -> TeacherOut:
        """Return what the teacher gave for some images in one view.

        Raises:
            InputError: If the shard of the view cannot be read.
        """
        if self._view is None or self._view[0] != view:
            try:
                self._view = (view, load_file(self.folder / f"view-{view}.safetensors"))
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"view {view} of {self.folder} cannot be read: {error}; run scalekd cache again"
                ) from error
        kept = {k: v[indices].to(self.device) for k, v in self._view[1].items()}
        return restore_teacher_out(kept, self.template, self.classes)


def pack_teacher_out(out: TeacherOut, top_k: int) -> dict[str, Tensor]:
    """Return what is kept of one batch, in main memory.

    Args:
        out: The teacher's pass over the batch.
        top_k: Number of logits to keep for each image, the largest.
    """
    kept = {"tokens": out.tokens.half()}
    if out.context.prefix is not None and out.context.prefix.shape[1]:
        kept["prefix"] = out.context.prefix.half()
    if out.logits is not None:
        logits = out.logits.float()
        values, classes = logits.topk(min(top_k, logits.shape[-1]))
        kept |= {"logits": values, "classes": classes.int(), "mass": logits.logsumexp(-1)}
    return {name: value.cpu() for name, value in kept.items()}


def restore_teacher_out(kept: dict[str, Tensor], template: TeacherOut, classes: int) -> TeacherOut:
    """Return what the teacher gave for a batch, from what was kept of it.

    Args:
        kept: From ``pack_teacher_out``, on the device.
        template: Any pass of the teacher, for what does not depend on the image.
        classes: Of the teacher's head.
    """
    prefix = kept["prefix"].float() if "prefix" in kept else None
    if prefix is None and template.context.prefix is not None:
        prefix = template.context.prefix.expand(len(kept["tokens"]), -1, -1)
    return TeacherOut(
        logits=_restore_logits(kept, classes) if "logits" in kept else None,
        tokens=kept["tokens"].float(),
        grid=template.grid,
        split=template.split,
        context=dataclasses.replace(template.context, prefix=prefix),
    )


def _restore_logits(kept: dict[str, Tensor], classes: int) -> Tensor:
    """Logits whose probabilities are the teacher's on the kept classes; the rest is spread evenly."""
    probabilities = (kept["logits"] - kept["mass"].unsqueeze(-1)).exp()
    missing = classes - probabilities.shape[-1]
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=SMALLEST_SHARE) / max(1, missing)
    dense = rest.expand(-1, classes).scatter(1, kept["classes"].long(), probabilities)
    return dense.clamp(min=SMALLEST_PROBABILITY).log()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no cache of scalekd; make one with scalekd cache") from error
