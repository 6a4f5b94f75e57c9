"""A finished image model with a new head, trained on labelled images."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from com_pt.adapters.files import LoadedModel, load_any
from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.image_models import (
    TowerClassifier,
    head_of,
    image_size_of,
    read_clip_config,
    save_tower_classifier,
    with_new_head,
    write_class_names,
)
from com_pt.adapters.timm_models import FOLDER as TIMM_FOLDER
from com_pt.adapters.timm_models import save_timm
from com_pt.training.data.labelled import LabelledImages, open_labelled
from com_pt.training.data.transforms import crop_range, image_transform
from com_pt.training.tasks.classify import TRAINING_CROP, ClassifyTask
from effml_common.errors import InputError


class FinetuneTask(ClassifyTask):
    """Classification from a finished model's weights.

    The setting ``model`` of its only stage is ``{path: FOLDER, freeze: false}``: a folder of open_clip,
    whose image tower is taken, or of timm. With ``freeze`` the head alone is trained.

    Data settings: those of ``classify``, and ``flip``: whether pictures are mirrored at random. The
    classes are those of ``train``, unless ``classes`` names them.
    """

    settings: ClassVar[frozenset[str]] = ClassifyTask.settings | {"flip"}
    streams: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self._sources: dict[str, LoadedModel] = {}

    @property
    def classes(self) -> int:
        """Number of classes of the training images."""
        return len(self.samples.classes)

    def open(self, part: str) -> LabelledImages:
        """Open the images of a part; those of ``train`` are cropped and mirrored at random."""
        from torchvision.transforms import v2

        size = self.data.get("image_size", 224)
        if part != "train":
            return open_labelled(self.data, part, image_transform(size, None))
        crop = image_transform(size, crop_range(self.data, TRAINING_CROP))
        mirror = [v2.RandomHorizontalFlip()] if self.data.get("flip", True) else []
        return open_labelled(self.data, part, v2.Compose([*mirror, crop]))

    def adopt(self, specs: Mapping[str, Any]) -> None:
        """Take the image size of the models, unless the data settings have it."""
        sizes = {name: image_size_of(self._source(spec).model) for name, spec in specs.items()}
        self.adopt_size("image_size", sizes)

    def build(self, spec: Any) -> nn.Module:
        """Return a copy of the finished model with a new head."""
        source = self._source(spec)
        model = copy.deepcopy(source.model)
        model = with_new_head(model, source.library, Path(spec["path"]), self.classes)
        if spec.get("freeze"):
            model.requires_grad_(False)
            head_of(model).requires_grad_(True)
        return model

    def _source(self, spec: Any) -> LoadedModel:
        """Return the finished model, which is read once."""
        path = spec["path"]
        if path not in self._sources:
            loaded = load_any(path)
            if loaded.library not in ("clip", "timm"):
                raise InputError(
                    f"{path} is a model of {loaded.library}; give a folder of open_clip or timm"
                )
            self._sources[path] = loaded
        return self._sources[path]

    def features(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Return logits and labels."""
        images, labels = batch
        return {"logits": model(images), "labels": labels}

    def macs(self, spec: Any) -> int:
        """Count forward MACs on the meta device."""
        image = torch.zeros(1, 3, *image_size_of(self._source(spec).model))
        return count_macs(lambda: self.build(spec).to("meta"), lambda m, x: m(x), image)

    def save(self, model: Any, spec: Any, folder: Path) -> None:
        """Write a folder that timm loads, or one of tower and head, and the names of the classes."""
        source = Path(spec["path"])
        if isinstance(model, TowerClassifier):
            save_tower_classifier(model, read_clip_config(source), folder)
        else:
            document = json.loads((source / TIMM_FOLDER.config).read_text(encoding="utf-8"))
            arguments = {"name": document["architecture"], **document.get("model_args", {})}
            save_timm(model, arguments, self.classes, folder)
        write_class_names(self.samples.classes, folder)

    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model of such a folder."""
        return load_any(str(folder)).model
