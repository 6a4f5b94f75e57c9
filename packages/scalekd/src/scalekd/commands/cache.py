"""The ``cache`` command: run the teacher once and keep what training needs of it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import Progress, say, warn
from scalekd.adapters.task import ScaleKDTask
from scalekd.config import CacheConfig
from scalekd.training.cache import MANIFEST, identify, pack_teacher_out
from scalekd.training.data import CheckedImages, TrainingImages, open_indexed_images
from scalekd.training.loaders import move_batch, training_loader
from scalekd.training.networks import build_task
from scalekd.training.plan import TrainingPlan
from scalekd.training.processes import Processes, this_process
from scalekd.training.recipe import resolve_recipe

BATCH_SIZE = 64  # images in one pass of the teacher
MIB = 2**20  # bytes


@dataclass(frozen=True)
class CacheSummary:
    """What was written."""

    folder: str
    images: int
    views: int
    mib: float

    def to_json(self) -> dict[str, Any]:
        """The values in plain JSON types."""
        return dict(vars(self))

    def __rich__(self) -> Any:
        return f"{self.folder}: {self.views} views of {self.images} images, {self.mib:.1f} MiB"


def cache(config: CacheConfig) -> CacheSummary:
    """Run the teacher over every view and write one shard per view.

    Raises:
        InputError: If device, data or teacher cannot be used, or the folder is not empty.
    """
    # Read: where to compute, where to write, and the images.
    processes = this_process(config.device)
    out = run_folder(config.out, "cache")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose another --out")
    plan = TrainingPlan(config=config, recipe=resolve_recipe(config), out=out)
    images = open_indexed_images(config, config.views)

    # Prepare: the networks of the training to come, and the transform that its loader will set.
    task = build_task(plan, processes)
    source = TrainingImages(images, min(BATCH_SIZE, len(images)))
    training_loader(source, plan, task.images.student_pixels, processes)
    _announce_size(task, images, config)

    # Run and write.
    out.mkdir(parents=True, exist_ok=True)
    hashes = _write_views(task, images, config, out, processes)
    manifest = {"made_for": identify(plan, task, images), "views": config.views, "files": hashes}
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    warn("a fixed number of views overfits sooner than fresh crops; prefer many views")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return CacheSummary(str(out), images=len(images), views=config.views, mib=written / MIB)


def _announce_size(task: ScaleKDTask, images: CheckedImages, config: CacheConfig) -> None:
    channels, (h, w) = task.plan.shape.final
    half_precision = 2  # bytes
    size = half_precision * channels * h * w * len(images) * config.views / MIB
    say(f"about {size:.0f} MiB for {config.views} views of {len(images)} images")


def _write_views(
    task: ScaleKDTask,
    images: CheckedImages,
    config: CacheConfig,
    out: Path,
    processes: Processes,
) -> dict[str, str]:
    """Write ``view-K.safetensors`` for each view; returns the SHA-256 hash of each file."""
    # Images in their order, so that a shard is indexed by the number of the image.
    device = processes.device
    batches = torch.utils.data.DataLoader(
        images,
        batch_size=BATCH_SIZE,
        num_workers=config.workers,
        shuffle=False,
        pin_memory=device.type == "cuda",
    )

    hashes = {}
    with Progress("caching", config.views * len(batches)) as bar:
        for view in range(config.views):
            # Each view has crops of its own, which depend on the seed, the view and the image.
            images.view = view
            parts: list[dict[str, Tensor]] = []
            for batch in batches:
                x, _, _ = move_batch(batch, device, config.channels_last)
                parts.append(pack_teacher_out(task.teach(x), config.top_k))
                bar.advance()

            shard = {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}
            data = save(shard)
            atomic_write(out / f"view-{view}.safetensors", data)
            hashes[f"view-{view}.safetensors"] = hashlib.sha256(data).hexdigest()
    return hashes
