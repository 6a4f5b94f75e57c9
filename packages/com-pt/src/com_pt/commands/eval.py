"""``com-pt eval``: judge a finished model on the user's own data."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from com_pt.adapters.files import load_any
from com_pt.config import EvalConfig
from com_pt.method.metrics import encode_images, evaluate_retrieval, linear_probe, perplexity
from com_pt.training.data.captions import CaptionData
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.report import Summary

# Libraries whose models a suite is for; the others are for CLIP.
LIBRARY_OF_SUITE = {"top1": "timm", "perplexity": "llama"}


def evaluate(config: EvalConfig) -> Summary:
    """Judge a model.

    Raises:
        InputError: If the model or its data do not fit the suite.
    """
    # Read the model.
    device = resolve_device(config.device)
    loaded = load_any(config.model)
    library = LIBRARY_OF_SUITE.get(config.suite, "clip")
    if loaded.library != library:
        raise InputError(
            f"{config.suite} is for {library}, and {config.model} is {loaded.library}; "
            "choose another --suite"
        )

    # Judge it.
    model: Any = loaded.model.to(device).eval()
    with forward_autocast(device):
        if config.suite == "perplexity":
            return Summary(_judge_language_model(config, model))
        if config.suite == "top1":
            return Summary(_judge_classifier(config, model, loaded.classes))
        if config.suite == "zero-shot":
            return Summary(_judge_zero_shot(config, model))
        return Summary(_judge_embeddings(config, model))


def forward_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast on CUDA, and elsewhere nothing: the model's own type."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _judge_language_model(config: EvalConfig, model: Any) -> dict[str, float]:
    tokenizer = "bytes" if config.tokenizer == "simple" else config.tokenizer
    settings = {"val": list(config.data), "length": config.length, "tokenizer": tokenizer}
    return perplexity(model, CausalLMTask(settings).blocks("val")[:])


def _judge_classifier(config: EvalConfig, model: Any, classes: int) -> dict[str, float]:
    size = list(model.patch_embed.img_size)
    data = {"val": config.data[0], "images": config.images}
    return ClassifyTask({**data, "classes": classes, "image_size": size}).evaluate(model)


def _judge_zero_shot(config: EvalConfig, model: Any) -> dict[str, float]:
    files = {"classes": config.classes, "templates": config.templates}
    settings = {**_clip_data(config, model), "zero_shot": {"images": config.data[0], **files}}
    return ClipTask(settings).evaluate(model)


def _judge_embeddings(config: EvalConfig, model: Any) -> dict[str, float]:
    """Retrieval, or a linear probe of the image embeddings."""
    data = _clip_data(config, model)
    held_out = CaptionData.open({**data, "val": list(config.data)}, "val", captions=None)
    images, texts = held_out.for_retrieval()
    if config.suite == "retrieval":
        return evaluate_retrieval(model, images, texts)

    # The classes of the probe are those of both files, in alphabetical order.
    fit = CaptionData.open({**data, "val": config.train}, "val", captions=None)
    names = sorted({line[0] for line in [*fit.texts, *held_out.texts]})
    fit_labels, labels = (
        torch.tensor([names.index(line[0]) for line in part.texts]) for part in (fit, held_out)
    )
    fit_features, features = (
        encode_images(model, part).cpu() for part in (fit.for_retrieval()[0], images)
    )
    return linear_probe(fit_features, fit_labels, features, labels)


def _clip_data(config: EvalConfig, model: Any) -> dict[str, Any]:
    """The data settings that a CLIP model asks for."""
    text = getattr(model, "text", model)
    return {
        "images": config.images,
        "tokenizer": config.tokenizer,
        "image_size": model.visual.image_size,
        "context_length": text.context_length,
    }
