"""Finished models of any supported library, from what the user named."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from com_pt.adapters.checkpoint_file import read_weights
from com_pt.adapters.image_models import FOLDER as CLASSIFIER_FOLDER
from com_pt.adapters.image_models import load_tower_classifier
from com_pt.adapters.llama_models import llama_config
from com_pt.adapters.model_folder import load_weights
from com_pt.adapters.open_clip_models import FOLDER as CLIP_FOLDER
from com_pt.adapters.open_clip_models import build_clip, clip_config, load_clip, save_clip
from com_pt.adapters.timm_models import build_timm, load_timm, save_timm
from effml_common.errors import InputError
from effml_common.parsing import one_line


@dataclass(frozen=True)
class LoadedModel:
    """A model, its library and its number of classes.

    The library is ``clip``, ``timm`` or ``llama``; ``classifier`` is a CLIP's image tower with a head.
    """

    model: nn.Module
    library: str
    classes: int = 0


def load_any(path: str, small_model: str | None = None) -> LoadedModel:
    """Load a finished model from its folder, or from a checkpoint file of open_clip.

    Raises:
        InputError: If it is neither.
    """
    # open_clip is told by the names of its files.
    folder = Path(path)
    if folder.is_file():
        return LoadedModel(_load_checkpoint(folder, small_model), "clip")
    if (folder / CLIP_FOLDER.config).is_file():
        return LoadedModel(load_clip(folder), "clip")
    if (folder / CLASSIFIER_FOLDER.config).is_file():
        classifier = load_tower_classifier(folder)
        return LoadedModel(classifier, "classifier", classifier.head.out_features)

    # The others are told by their config.json.
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no model: {one_line(str(error))}; give a folder of open_clip, timm or Llama"
        ) from error
    if "architecture" in document:
        return LoadedModel(load_timm(folder), "timm", document["num_classes"])
    if document.get("model_type") == "llama":
        from transformers import LlamaForCausalLM

        return LoadedModel(LlamaForCausalLM.from_pretrained(folder), "llama")
    raise InputError(f"{path} is a {document.get('model_type')}; use open_clip, timm or Llama")


def _load_checkpoint(file: Path, name: str | None) -> nn.Module:
    if name is None:
        raise InputError(
            f"{file} does not tell its model; give the folder of a model, or --small-model NAME to grow"
        )
    return load_weights(build_clip(clip_config(name)), read_weights(file), file)


def build_like(small: LoadedModel, large: str, seed: int) -> tuple[nn.Module, Any]:
    """Build a fresh larger model of the same library, and its settings."""
    torch.manual_seed(seed)
    if small.library == "clip":
        return build_clip(clip_config(large)), large
    spec = read_spec(large)
    if small.library == "timm":
        return build_timm(spec, small.classes), spec
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(spec)), spec


def read_spec(text: str) -> Any:
    """Return the content of a JSON file, or the text itself.

    Raises:
        InputError: If the file is no JSON.
    """
    if not text.endswith(".json"):
        return text
    try:
        return json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{text} is no JSON: {one_line(str(error))}; correct it") from error


def save_any(model: nn.Module, like: LoadedModel, spec: Any, folder: Path) -> None:
    """Write a model as its library loads it."""
    if like.library == "clip":
        save_clip(model, clip_config(spec), folder)
    elif like.library == "timm":
        save_timm(model, spec, like.classes, folder)
    else:
        model.save_pretrained(folder)  # pyright: ignore


@torch.no_grad()
def compare_outputs(small: LoadedModel, large: nn.Module) -> dict[str, dict[str, float]]:
    """Return cosine and largest difference of both models' outputs on random inputs, by stream.

    Both models are on one device; the inputs are drawn on the CPU, the same for every device.
    """
    # Random inputs of the kind that the library's models take.
    torch.manual_seed(0)
    pairs: dict[str, Any] = {}
    models: list[Any] = [small.model.eval(), large.eval()]
    device = next(large.parameters()).device
    if small.library == "clip":
        size = models[1].visual.image_size
        images = torch.randn(8, 3, *((size, size) if isinstance(size, int) else size)).to(device)
        text = getattr(models[0], "text", models[0])
        ids = torch.randint(1, text.vocab_size, (8, text.context_length)).to(device)
        pairs["image"] = [m.encode_image(images) for m in models]
        pairs["text"] = [m.encode_text(ids) for m in models]
    elif small.library == "timm":
        stem = models[1].patch_embed
        images = torch.randn(8, stem.proj.in_channels, *stem.img_size).to(device)
        pairs["logits"] = [m(images) for m in models]
    else:
        ids = torch.randint(0, models[0].config.vocab_size, (4, 32)).to(device)
        pairs["logits"] = [m(input_ids=ids).logits for m in models]

    # Streams whose widths differ cannot be compared.
    return {
        name: {
            "cosine": float(torch.cosine_similarity(a, b, dim=-1).mean()),
            "largest difference": float((a - b).abs().max()),
        }
        for name, (a, b) in pairs.items()
        if a.shape == b.shape
    }
