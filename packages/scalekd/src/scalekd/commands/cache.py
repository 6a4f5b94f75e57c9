"""The ``cache`` command: run the teacher once and keep what training needs of it."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import progress, say, warn
from scalekd.adapters.models import build_student, build_teacher
from scalekd.adapters.task import ScaleKDTask
from scalekd.adapters.teacher import TeacherSplit
from scalekd.config import CacheConfig
from scalekd.training.cache import MANIFEST, identity, pack
from scalekd.training.data import CheckedImages, dataset_of, on_device, training_loader
from scalekd.training.recipe import recipe_of


@dataclass(frozen=True)
class Cached:
    """What was written."""

    folder: str
    images: int
    views: int
    mib: float

    def to_json(self) -> dict[str, Any]:
        """The facts."""
        return dict(vars(self))

    def __rich__(self) -> Any:
        return f"{self.folder}: {self.views} views of {self.images} images, {self.mib:.1f} MiB"


def cache(config: CacheConfig) -> Cached:
    """Run the teacher over every view and write one shard per view.

    Raises:
        InputError: If device, data or teacher cannot be used, or the folder is not empty.
    """
    device = resolve_device(config.device)
    out = Path(config.out or time.strftime("runs/cache-%Y%m%d-%H%M%S"))
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose another --out")
    images = dataset_of(config, config.train_split, training=True)
    if isinstance(images, torch.utils.data.IterableDataset):
        raise ConfigError("a cache needs images with an index; use a folder or hfds/")
    dataset = CheckedImages(images, config.num_classes, False, config.views, config.seed)
    recipe = recipe_of(config)
    torch.manual_seed(
        config.seed
    )  # as in train: a teacher without learned weights is the same there
    teacher = TeacherSplit.from_timm(build_teacher(config), tail_blocks=config.tail_blocks)
    size = (config.img_size, config.img_size)
    task = ScaleKDTask(
        build_student(config),
        teacher,
        config=config,
        img_size=size,
        teacher_resize=config.teacher_resize,
        device=device,
    )
    loader = training_loader(
        dataset, config, recipe, task.export_student(), min(64, len(dataset)), device, False
    )
    batches = torch.utils.data.DataLoader(
        dataset,
        batch_size=64,
        num_workers=config.workers,
        shuffle=False,
        pin_memory=device.type == "cuda",
    )
    out.mkdir(parents=True, exist_ok=True)
    hashes = {}
    _warn_of_size(task, dataset, config)
    with progress("caching", config.views * len(batches)) as bar:
        for view in range(config.views):
            dataset.view = view
            parts: list[dict[str, Tensor]] = []
            for batch in batches:
                x, _, _ = on_device(batch, device, config.channels_last)
                parts.append(pack(task.teach(x), config.top_k))
                bar.advance()
            whole = {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}
            data = save(whole)
            atomic_write(out / f"view-{view}.safetensors", data)
            hashes[f"view-{view}.safetensors"] = hashlib.sha256(data).hexdigest()
    manifest = {"made_for": identity(config, task, loader), "views": config.views, "files": hashes}
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    written = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**20
    warn("a fixed number of views overfits sooner than fresh crops; prefer many views")
    return Cached(folder=str(out), images=len(dataset), views=config.views, mib=written)


def _warn_of_size(task: ScaleKDTask, dataset: CheckedImages, config: CacheConfig) -> None:
    final = task.plan.shape.final
    size = 2 * final[0] * final[1][0] * final[1][1] * len(dataset) * config.views / 2**20
    say(f"about {size:.0f} MiB for {config.views} views of {len(dataset)} images")
