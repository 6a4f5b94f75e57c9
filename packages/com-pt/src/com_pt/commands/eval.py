"""``com-pt eval``: judge a finished model on the user's own data."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from com_pt.adapters.accelerator import make_accelerator
from com_pt.adapters.files import load_any
from com_pt.config import EvalConfig
from com_pt.method.metrics import linear_probe
from com_pt.training.data.captions import CaptionData
from com_pt.training.embedding import (
    encode_pictures,
    evaluate_retrieval,
    pool_pictures,
)
from com_pt.training.streaming import Reading
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.report import Summary

# Libraries whose models a suite judges.
LIBRARIES_OF_SUITE = {
    "zero-shot": ("clip",),
    "retrieval": ("clip",),
    "probe": ("clip", "timm"),
    "top1": ("timm",),
    "perplexity": ("llama",),
}


def evaluate(config: EvalConfig) -> Summary:
    """Judge a model; several processes share the work and find what one would find.

    Raises:
        InputError: If the model or its data do not fit the suite.
    """
    # Read the model.
    device = resolve_device(config.device)
    loaded = load_any(config.model)
    libraries = LIBRARIES_OF_SUITE[config.suite]
    if loaded.library not in libraries:
        raise InputError(
            f"{config.suite} is for {' and '.join(libraries)}, and {config.model} is "
            f"{loaded.library}; choose another --suite"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        make_accelerator("fp32", device)  # lets the processes talk with one another

    # Judge it.
    model: Any = loaded.model.to(device).eval()
    with forward_autocast(device):
        if config.suite == "perplexity":
            return Summary(_judge_language_model(config, model))
        if config.suite == "top1":
            return Summary(_judge_classifier(config, model, loaded.classes))
        if config.suite == "zero-shot":
            return Summary(_judge_zero_shot(config, model))
        if config.suite == "probe":
            return Summary(_judge_probe(config, model, loaded.library))
        return Summary(_judge_retrieval(config, model))


def forward_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast on CUDA, and elsewhere nothing: the model's own type."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _reading_settings(config: EvalConfig) -> dict[str, Any]:
    """Return the data settings of the flags that say how data are read."""
    flags = {"val_batch": config.batch_size, "val_workers": config.workers}
    return {name: value for name, value in flags.items() if value is not None}


def _judge_language_model(config: EvalConfig, model: Any) -> dict[str, float]:
    tokenizer = "bytes" if config.tokenizer == "simple" else config.tokenizer
    settings = {"val": list(config.data), "length": config.length, "tokenizer": tokenizer}
    return CausalLMTask({**settings, **_reading_settings(config)}).evaluate(model)


def _judge_classifier(config: EvalConfig, model: Any, classes: int) -> dict[str, float]:
    data = {"val": config.data[0], "images": config.images, "classes": classes}
    size = list(model.patch_embed.img_size)
    return ClassifyTask({**data, "image_size": size, **_reading_settings(config)}).evaluate(model)


def _judge_zero_shot(config: EvalConfig, model: Any) -> dict[str, float]:
    files = {"classes": config.classes, "templates": config.templates}
    settings = {**_clip_data(config, model), "zero_shot": {"images": config.data[0], **files}}
    return ClipTask(settings).evaluate(model)


def _judge_retrieval(config: EvalConfig, model: Any) -> dict[str, float]:
    data = _clip_data(config, model)
    held_out = CaptionData.open({**data, "val": list(config.data)}, "val", captions=None)
    return evaluate_retrieval(model, held_out, Reading.of(data, model))


def _judge_probe(config: EvalConfig, model: Any, library: str) -> dict[str, float]:
    """Fit a linear probe on the features of the images of ``--train``."""
    # Both files; the classes of the probe are those of both, in alphabetical order.
    data = _clip_data(config, model)
    fit, held_out = (
        CaptionData.open({**data, "val": source}, "val", captions=None)
        for source in (config.train, list(config.data))
    )
    names = sorted({line[0] for line in fit.texts + held_out.texts})
    fit_labels, labels = (
        torch.tensor([names.index(line[0]) for line in part.texts]) for part in (fit, held_out)
    )

    # Features as users of the model take them: a CLIP's unit embeddings, a timm model's pooled features.
    encode = encode_pictures if library == "clip" else pool_pictures
    fit_features, features = (
        encode(model, part, Reading.of(data, model)) for part in (fit, held_out)
    )

    # The regression wants float64, which Apple's GPUs lack.
    place = torch.device("cpu") if fit_features.device.type == "mps" else fit_features.device
    tensors = (fit_features, fit_labels, features, labels)
    return linear_probe(*(tensor.to(place) for tensor in tensors), decay=config.decay)


def _clip_data(config: EvalConfig, model: Any) -> dict[str, Any]:
    """The data settings that a CLIP model asks for."""
    text = getattr(model, "text", model)
    return {
        "images": config.images,
        "tokenizer": config.tokenizer,
        "image_size": model.visual.image_size,
        "context_length": text.context_length,
        **_reading_settings(config),
    }
