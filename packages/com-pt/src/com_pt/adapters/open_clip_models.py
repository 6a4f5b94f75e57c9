"""Building, saving and loading open_clip models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from com_pt.adapters.model_folder import FolderFormat, load_weights
from com_pt.errors import GrowthError
from effml_common.errors import ConfigError
from effml_common.parsing import did_you_mean, one_line

OWN_CONFIGS = Path(__file__).parent.parent / "model_configs"
FOLDER = FolderFormat("open_clip", "open_clip_config.json", "open_clip_model.safetensors")


def clip_config(spec: Any) -> dict[str, Any]:
    """Return the complete settings of a CLIP model.

    Args:
        spec: A name of open_clip or of this package (``compt-ViT-S-16``), a JSON file, or the
            settings themselves (``embed_dim``, ``vision_cfg``, ``text_cfg``).

    Raises:
        ConfigError: If there is no such model, or the settings are not complete.
    """
    if isinstance(spec, str):
        spec = _read_named(spec)
    if not isinstance(spec, Mapping) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(spec):
        raise ConfigError(
            "a CLIP model needs embed_dim, vision_cfg and text_cfg; give these or a model's name"
        )

    # Widths must hold whole heads: open_clip would round their number down.
    config = {**spec, "vision_cfg": {**spec["vision_cfg"]}, "text_cfg": {**spec["text_cfg"]}}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision and isinstance(vision.get("layers"), int):
        width, head_width = vision["width"], vision.get("head_width", 64)
        if width % head_width:
            raise GrowthError(
                f"image width {width} is no multiple of the head width {head_width}; change one"
            )
    if "hf_model_name" not in text:
        heads = text.get("heads", 8)
        if text.get("width", 512) % heads:
            raise ConfigError(
                f"text width {text['width']} is no multiple of {heads} heads; change one"
            )
    return config


def _read_named(name: str) -> Any:
    import open_clip

    # A file of this package, or one of the user's.
    own = OWN_CONFIGS / f"{name}.json"
    file = own if own.exists() else Path(name)
    if file.suffix == ".json" and file.exists():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{name} is no JSON: {one_line(str(error))}; correct it") from error

    # A name of open_clip.
    config = open_clip.get_model_config(name)
    if config is None:
        known = [*open_clip.list_models(), *(p.stem for p in OWN_CONFIGS.glob("*.json"))]
        raise ConfigError(
            f"there is no CLIP model {name}; {did_you_mean(name, known, 'give a JSON')}"
        )
    return config


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """Build a fresh model of class ``CLIP``, or ``CustomTextCLIP`` where the settings ask for it.

    Raises:
        ConfigError: If open_clip does not accept the settings.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {k: v for k, v in config.items() if k not in ("custom_text", "hf_tokenizer_name")}
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    try:
        return (CustomTextCLIP if custom else CLIP)(**settings, output_dict=True)
    except (TypeError, AssertionError) as error:
        raise ConfigError(
            f"open_clip refuses the model: {one_line(str(error))}; see its configs"
        ) from error


def save_clip(model: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Write a folder for ``open_clip.create_model("local-dir:FOLDER")``."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    # The settings are the model's, with the eps that lossless growth may have changed.
    towers = {
        "vision_cfg": getattr(model.visual, "ln_post", None),
        "text_cfg": getattr(getattr(model, "text", model), "ln_final", None),
    }
    model_cfg = {**config}
    for section, norm in towers.items():
        if norm is not None and norm.eps != 1e-5:
            norms = {**(config[section].get("norm_kwargs") or {}), "eps": norm.eps}
            model_cfg[section] = {**config[section], "norm_kwargs": norms}

    # Preprocessing as in the data of this package.
    size = getattr(model.visual, "image_size", 224)
    preprocess = {
        "size": list(size) if isinstance(size, tuple | list) else size,
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    FOLDER.write(model, {"model_cfg": model_cfg, "preprocess_cfg": preprocess}, folder)


def load_clip(folder: Path | str) -> nn.Module:
    """Load the model of such a folder.

    Raises:
        InputError: If it is none.
    """
    document, tensors = FOLDER.read(Path(folder))
    if "model_cfg" not in document:
        raise FOLDER.refusal(Path(folder), "model_cfg is missing")
    return load_weights(build_clip(clip_config(document["model_cfg"])), tensors, Path(folder))
