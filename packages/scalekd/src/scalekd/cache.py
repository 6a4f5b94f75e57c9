"""The ``cache`` command: what the teacher's trunk would compute again in every epoch, kept on disk.

A cache holds K augmented views of each image: final tokens (half precision), prefix tokens at the
split, and the largest logits. The augmentation of an image in a view depends on (seed, view, index)
alone, so that training sees the very crop that the teacher saw. The tail still runs: it is needed for
gradients.
"""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import progress, say, warn
from scalekd.adapters.data import CheckedImages, dataset_of, on_device, training_loader
from scalekd.adapters.models import build_student, build_teacher, fingerprint
from scalekd.adapters.pairing import normalisation
from scalekd.adapters.tail import TeacherOut, TeacherSplit
from scalekd.adapters.task import ScaleKDTask
from scalekd.config import CacheConfig, TrainConfig
from scalekd.recipe import recipe_of

MANIFEST = "manifest.json"


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
