"""Finished image models as classifiers: timm models, and image towers of CLIP with a head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from com_pt.adapters.model_folder import FolderFormat, load_weights
from com_pt.adapters.open_clip_models import FOLDER as CLIP_FOLDER
from com_pt.adapters.open_clip_models import build_clip, clip_config
from effml_common.errors import InputError

FOLDER = FolderFormat("CLIP classifier", "clip_classifier.json", "clip_classifier.safetensors")
NAMES = "classes.txt"  # the names of the classes in the order of the logits, one a line


class TowerClassifier(nn.Module):
    """A CLIP's image tower with a linear head on its embedding.

    Args:
        tower: The image tower, which maps pictures [b, 3, h, w] to embeddings [b, d].
        width: d.
        classes: Number of classes.
    """

    def __init__(self, tower: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [b, classes]."""
        return self.head(self.tower(images))


def with_new_head(model: Any, library: str, source: Path, classes: int) -> nn.Module:
    """Return a classifier of a finished model; its head is zero, so that all classes begin alike.

    Args:
        model: The model, of which a timm model is changed in place.
        library: ``clip`` or ``timm``.
        source: The folder that the model comes from.
        classes: Number of classes.
    """
    if library == "clip":
        width = clip_config(read_clip_config(source))["embed_dim"]
        model = TowerClassifier(model.visual, width, classes)
    else:
        model.reset_classifier(classes)
    head = head_of(model)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return model


def head_of(model: Any) -> nn.Linear:
    """Return the linear layer that gives the logits.

    Raises:
        InputError: If there is none, or more than one.
    """
    head = model.head if isinstance(model, TowerClassifier) else model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the head of the model, a {type(model).__name__}, is not one linear layer; give a model "
            "with such a head"
        )
    return head


def image_size_of(model: Any) -> list[int]:
    """Return height and width of the pictures that a CLIP, timm model or classifier takes."""
    if hasattr(model, "patch_embed"):
        return list(model.patch_embed.img_size)
    tower: Any = model.tower if isinstance(model, TowerClassifier) else model.visual
    size = tower.image_size
    return [size, size] if isinstance(size, int) else list(size)


def read_clip_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the CLIP in a folder of open_clip, or of a classifier made of it."""
    for file in (CLIP_FOLDER.config, FOLDER.config):
        if (folder / file).is_file():
            return json.loads((folder / file).read_text(encoding="utf-8"))["model_cfg"]
    raise CLIP_FOLDER.refusal(folder, "there are no settings")


def save_tower_classifier(model: TowerClassifier, config: dict[str, Any], folder: Path) -> None:
    """Write a folder of tower and head, with the settings of the CLIP that the tower is of."""
    document = {"model_cfg": config, "num_classes": model.head.out_features}
    FOLDER.write(model, document, folder)


def load_tower_classifier(folder: Path) -> TowerClassifier:
    """Load the classifier of such a folder.

    Raises:
        InputError: If it is none.
    """
    document, tensors = FOLDER.read(folder)
    config = clip_config(document["model_cfg"])
    tower: Any = build_clip(config).visual
    model = TowerClassifier(tower, config["embed_dim"], document["num_classes"])
    load_weights(model, tensors, folder)
    return model


def write_class_names(names: Sequence[str], folder: Path) -> None:
    """Write the names of a classifier's classes beside its weights."""
    (folder / NAMES).write_text("\n".join(names) + "\n", encoding="utf-8")
