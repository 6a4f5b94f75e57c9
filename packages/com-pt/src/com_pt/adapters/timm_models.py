"""Building, saving and loading timm models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from com_pt.adapters.model_folder import FolderFormat, load_weights
from effml_common.errors import ConfigError
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
        ConfigError: If timm does not know it or refuses the arguments.
    """
    import timm

    name, arguments = timm_arguments(spec, classes)
    try:
        return timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm refuses {name}: {one_line(str(error))}; see timm.list_models()"
        ) from error


def save_timm(model: Any, spec: Any, classes: int, folder: Path) -> None:
    """Write a folder for ``timm.create_model("local-dir:FOLDER")``."""
    # Preprocessing as timm reads it from a folder.
    name, arguments = timm_arguments(spec, classes)
    keep = ("mean", "std", "interpolation", "crop_pct", "first_conv", "classifier")
    known = getattr(model, "pretrained_cfg", None) or {}
    size = list(getattr(model.patch_embed, "img_size", (224, 224)))
    pretrained = {k: known[k] for k in keep if k in known}
    pretrained |= {
        "input_size": [model.patch_embed.proj.in_channels, *size],
        "num_classes": classes,
    }

    # Architecture and arguments make the model again.
    document = {
        "architecture": name.partition(".")[0],
        "num_classes": arguments["num_classes"],
        "num_features": model.num_features,
        "pretrained_cfg": pretrained,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
    }
    FOLDER.write(model, document, folder)


def load_timm(folder: Path | str) -> nn.Module:
    """Load the model of such a folder.

    Raises:
        InputError: If it is none.
    """
    document, tensors = FOLDER.read(Path(folder))
    try:
        spec = {"name": document["architecture"], **document.get("model_args", {})}
        classes = document["num_classes"]
    except (KeyError, TypeError) as error:
        raise FOLDER.refusal(Path(folder), f"{error} is missing") from error
    return load_weights(build_timm(spec, classes), tensors, Path(folder))
