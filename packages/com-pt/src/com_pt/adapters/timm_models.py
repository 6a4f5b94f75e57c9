"""Building, saving and loading timm models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from com_pt.adapters.model_folder import FolderFormat, load_weights
from effml_common.errors import ConfigError
from effml_common.logging import warn, words
from effml_common.parsing import one_line

FOLDER = FolderFormat("timm", "config.json", "model.safetensors")


def timm_arguments(spec: Any, classes: int) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of ``timm.create_model``.

    Args:
        spec: A name, or ``{"name": ..., embed_dim: ..., ...}``.
        classes: Number of classes, unless the arguments have ``num_classes``.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(spec, str):
        return spec, {"num_classes": classes}
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(f"{spec!r} is no timm model; give a name, or name and arguments")
    return spec["name"], {"num_classes": classes, **{k: v for k, v in spec.items() if k != "name"}}


def build_timm(spec: Any, classes: int) -> nn.Module:
    """Build a fresh model.

    Raises:
        ConfigError: If timm does not know it or refuses the arguments, or it has no patches.
    """
    import timm

    name, arguments = timm_arguments(spec, classes)
    try:
        model = timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm refuses {name}: {one_line(str(error))}; see timm.list_models()"
        ) from error

    # Growth, cost and picture sizes are those of vision transformers.
    if not hasattr(model, "patch_embed"):
        raise ConfigError(f"{name} has no patches; use a vision transformer, such as a ViT or Swin")
    return model


def save_timm(model: Any, spec: Any, classes: int, folder: Path) -> None:
    """Write a folder for ``timm.create_model("local-dir:FOLDER")``.

    timm takes no eps of norms from a folder; a warning tells if the model's is another.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    # Preprocessing as in the data of this package: CLIP's, the whole picture, no border cut off.
    name, arguments = timm_arguments(spec, classes)
    known = getattr(model, "pretrained_cfg", None) or {}
    height, width = getattr(model.patch_embed, "img_size", (224, 224))
    pretrained = {k: known[k] for k in ("first_conv", "classifier") if k in known}
    pretrained |= {
        "input_size": [model.patch_embed.proj.in_channels, height, width],
        "num_classes": classes,
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center" if height == width else "squash",
    }
    with torch.device("meta"):
        _warn_of_lost_eps(model, build_timm(spec, classes))

    # Architecture and arguments make the model again.
    document = {
        "architecture": name.partition(".")[0],
        "num_classes": arguments["num_classes"],
        "num_features": model.num_features,
        "pretrained_cfg": pretrained,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
    }
    FOLDER.write(model, document, folder)


def _warn_of_lost_eps(model: nn.Module, reloaded: nn.Module) -> None:
    eps = {n: m.eps for n, m in reloaded.named_modules() if hasattr(m, "eps")}
    for name, module in model.named_modules():
        if name in eps and eps[name] != module.eps:
            warn(
                f"eps of {name} is {module.eps:.3g} and will be {eps[name]:.3g} when timm loads the "
                "folder, so that outputs move a little; grow by a whole multiple of the width, or embed"
            )
            return


def load_timm(folder: Path | str) -> nn.Module:
    """Load the model of such a folder; a warning tells if it was trained on other pixels.

    Raises:
        InputError: If it is none.
    """
    document, tensors = FOLDER.read(Path(folder))
    _warn_of_other_pixels(document, Path(folder))
    try:
        spec = {"name": document["architecture"], **document.get("model_args", {})}
        classes = document["num_classes"]
    except (KeyError, TypeError) as error:
        raise FOLDER.refusal(Path(folder), f"{error} is missing") from error
    return load_weights(build_timm(spec, classes), tensors, Path(folder))


def _warn_of_other_pixels(document: Mapping[str, Any], folder: Path) -> None:
    """Warn of a model from elsewhere, whose pixels had another mean or deviation than CLIP's."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pretrained = document.get("pretrained_cfg")
    for name, ours in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
        theirs = pretrained.get(name) if isinstance(pretrained, Mapping) else None
        if theirs is not None and list(theirs) != list(ours):
            warn(
                f"{folder} was trained on pixels with {name} {words(theirs)}, and here they get CLIP's, "
                f"{words(ours)}: its accuracy suffers unless it is trained further"
            )
            return
