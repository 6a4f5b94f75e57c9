"""Supervised classification with timm models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.timm_models import build_timm, load_timm, save_timm
from com_pt.method.metrics import label_ranks, name_accuracies
from com_pt.training.data.counts import check_settings
from com_pt.training.data.decoding import read_names
from com_pt.training.data.labelled import LabelledImages, class_names, open_labelled
from com_pt.training.data.labelling import lists_classes
from com_pt.training.data.transforms import crop_range, image_transform
from com_pt.training.embedding import rank_labels
from com_pt.training.streaming import Reading
from com_pt.training.tasks.base import Task

TRAINING_CROP = (0.35, 1.0)  # share of the area that a random crop keeps
USUAL_CLASSES = 1000  # those of ImageNet, where neither the settings nor data tell


class ClassifyTask(Task):
    """Images with one label each.

    Data settings: ``train`` and ``val`` (CSV of path and label, folder of class folders, or data set of
    Hugging Face with ``image_key`` and ``label_key``), ``images`` (folder of the paths), ``classes``
    (number, names or a file of names), ``image_size``, ``crop_scale``, ``smoothing`` of the labels,
    ``val_batch`` and ``val_workers`` of the evaluation.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "train",
            "val",
            "images",
            "image_key",
            "label_key",
            "classes",
            "image_size",
            "crop_scale",
            "smoothing",
            "val_batch",
            "val_workers",
        }
    )
    streams: ClassVar[tuple[str, ...]] = ("pooled",)
    has_readers: ClassVar[bool] = True
    headline: ClassVar[str] = "top-1"

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        check_settings(data)
        self.smoothing = float(data.get("smoothing", 0.1))
        self._classes: int | None = None
        self._samples: LabelledImages | None = None

    @property
    def classes(self) -> int:
        """Number of classes: of the settings, else of a folder or data set to train on, else 1000."""
        if self._classes is None:
            setting = self.data.get("classes")
            if setting is not None:
                self._classes = setting if isinstance(setting, int) else len(read_names(setting))
            elif lists_classes(self.data.get("train")):
                self._classes = len(class_names(self.data, "train"))
            else:
                self._classes = USUAL_CLASSES
        return self._classes

    def build(self, spec: Any) -> nn.Module:
        """Build a timm model; the classes are the data's unless the stage says otherwise."""
        return build_timm(spec, self.classes)

    def adopt(self, specs: Mapping[str, Any]) -> None:
        """Take the image size of the models, unless the data settings have it."""
        sizes = {}
        for name, spec in specs.items():
            with torch.device("meta"):
                model: Any = build_timm(spec, self.classes)
            if hasattr(model, "patch_embed"):
                sizes[name] = list(model.patch_embed.img_size)
        if sizes:
            self.adopt_size("image_size", sizes)

    def check_data(self) -> None:
        """Open the held-out images and decode one.

        Raises:
            InputError: If they cannot be read, or their classes are not those of the training images.
        """
        if "val" in self.data:
            self.open("val").image(0)

    @property
    def samples(self) -> LabelledImages:
        """The training images, opened at first use."""
        if self._samples is None:
            self._samples = self.open("train")
        return self._samples

    def open(self, part: str) -> LabelledImages:
        """Open the images of a part; those of ``train`` with random crops.

        Raises:
            InputError: If there are none, a file is missing, or a label is no class.
        """
        crop = crop_range(self.data, TRAINING_CROP) if part == "train" else None
        data = self.data if "classes" in self.data else {**self.data, "classes": self.classes}
        return open_labelled(data, part, image_transform(data.get("image_size", 224), crop))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.samples.image(index), int(self.samples.labels[index])

    def features(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Return pooled features before the classifier [b, w], logits and labels."""
        images, labels = batch
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        head = model.head.fc if hasattr(model.head, "fc") else model.head
        return {"pooled": pooled, "logits": head(pooled), "labels": labels}

    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross-entropy with smoothed labels."""
        value = F.cross_entropy(
            outputs["logits"].float(), outputs["labels"], label_smoothing=self.smoothing
        )
        return {"cross entropy": value}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure top-1 (and top-5) on the held-out images."""
        if "val" not in self.data:
            return {}
        ranks = rank_labels(model, self.open("val"), Reading.of(self.data, model))
        return name_accuracies(ranks, self.classes)

    @torch.no_grad()
    def accuracy(self, model: Any, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Measure a model on images in memory."""
        reading = Reading.of(self.data, model)
        ranks = [
            label_ranks(model(part.to(reading.device)).float(), own)
            for part, own in zip(
                images.split(reading.batch), labels.split(reading.batch), strict=True
            )
        ]
        return name_accuracies(torch.cat(ranks), self.classes)

    def chance(self) -> float | None:
        """Return one in the number of classes, where there are held-out images."""
        return 1 / self.classes if "val" in self.data else None

    def macs(self, spec: Any) -> int:
        """Count forward MACs on the meta device: timm has too many shapes for a formula."""
        with torch.device("meta"):
            model: Any = build_timm(spec, self.classes)
        size, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
        image = torch.zeros(1, channels, *size)
        return count_macs(lambda: build_timm(spec, self.classes), lambda m, x: m(x), image)

    def save(self, model: nn.Module, spec: Any, folder: Path) -> None:
        """Write a ``timm.create_model("local-dir:...")`` folder."""
        save_timm(model, spec, self.classes, folder)

    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model of such a folder."""
        return load_timm(folder)
