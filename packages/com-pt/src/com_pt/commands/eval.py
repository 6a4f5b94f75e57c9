"""``com-pt eval``: judge a finished model on the user's own data."""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from com_pt.adapters.accelerator import make_accelerator
from com_pt.adapters.files import load_any
from com_pt.adapters.image_models import NAMES, image_size_of
from com_pt.config import EvalConfig
from com_pt.method.metrics import linear_probe, name_accuracies
from com_pt.training.data.captions import CaptionData
from com_pt.training.data.counts import check_use
from com_pt.training.data.labelled import open_labelled
from com_pt.training.data.texts import BYTE_TOKENS, load_tokenizer
from com_pt.training.data.tokenizers import vocabulary_size
from com_pt.training.data.transforms import image_transform
from com_pt.training.embedding import (
    encode_pictures,
    evaluate_retrieval,
    pool_pictures,
    rank_labels,
)
from com_pt.training.run_folder import SETTINGS
from com_pt.training.streaming import Reading
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.clip import ClipTask
from com_pt.training.tasks.zero_shot import read_labels
from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.logging import warn
from effml_common.report import Summary

# Libraries whose models a suite judges.
LIBRARIES_OF_SUITE = {
    "zero-shot": ("clip",),
    "retrieval": ("clip",),
    "probe": ("clip", "timm"),
    "top1": ("timm", "classifier"),
    "perplexity": ("llama",),
}


def evaluate(config: EvalConfig) -> Summary:
    """Judge a model; several processes share the work and find what one would find.

    Raises:
        InputError: If the model or its data do not fit the suite.
    """
    # Read the model; a folder of pictures that nothing would look into is a mistake.
    check_use({"train": config.train, "val": one_or_all(config.data), "images": config.images})
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
    # A model is judged with its own tokenizer, if that lies beside it; com-pt's own read bytes.
    tokenizer = config.tokenizer
    if tokenizer == "simple":
        has_own = (Path(config.model) / "tokenizer_config.json").is_file()
        tokenizer = config.model if has_own else "bytes"
    tokens = BYTE_TOKENS if tokenizer == "bytes" else len(load_tokenizer(tokenizer))
    _check_tokenizer(config, tokenizer, tokens, model.get_input_embeddings().num_embeddings)

    settings = {"val": list(config.data), "length": config.length, "tokenizer": tokenizer}
    return CausalLMTask({**settings, **_reading_settings(config)}).evaluate(model)


def _check_tokenizer(config: EvalConfig, tokenizer: str, tokens: int, embeddings: int) -> None:
    """Refuse a tokenizer that has tokens without an embedding; warn of one of another training."""
    if tokens > embeddings:
        raise InputError(
            f"the tokenizer {tokenizer} has {tokens} tokens and {config.model} embeddings of "
            f"{embeddings}; give --tokenizer with the one that it was trained with"
        )

    # A member lies beside the settings of its chain. Other ids of the same range would go unnoticed.
    settings = Path(config.model).parent / "run" / SETTINGS
    if settings.is_file():
        trained = json.loads(settings.read_text(encoding="utf-8"))["data"].get("tokenizer")
        if isinstance(trained, str) and Path(trained).resolve() != Path(tokenizer).resolve():
            warn(
                f"{config.model} was trained with the tokenizer {trained} and is judged with "
                f"{tokenizer}; give --tokenizer {trained}"
            )


def _judge_classifier(config: EvalConfig, model: Any, classes: int) -> dict[str, float]:
    # The names of the model's classes, or their number: then labels are numbers or class folders.
    beside = Path(config.model) / NAMES
    listed = config.classes or (str(beside) if beside.is_file() else None)
    names = None if listed is None else read_labels(listed)
    data = {"val": one_or_all(config.data), "images": config.images, "classes": names or classes}
    transform = image_transform(image_size_of(model), None)
    held_out = open_labelled(data, "val", transform)

    # Folders are numbered by themselves: with one missing, all labels after it would be wrong.
    if len(held_out.classes) != classes:
        raise InputError(
            f"{config.data[0]} has {len(held_out.classes)} classes and the model {classes}; "
            "give --classes FILE with the names of all of them, in the model's order"
        )
    ranks = rank_labels(model, held_out, Reading.of(_reading_settings(config), model))
    return name_accuracies(ranks, classes)


def _judge_zero_shot(config: EvalConfig, model: Any) -> dict[str, float]:
    files = {"classes": config.classes, "templates": config.templates}
    settings = {
        **_clip_data(config, model),
        "zero_shot": {"images": one_or_all(config.data), **files},
    }
    return ClipTask(settings).evaluate(model)


def _judge_retrieval(config: EvalConfig, model: Any) -> dict[str, float]:
    data = _clip_data(config, model)
    held_out = CaptionData.open({**data, "val": one_or_all(config.data)}, "val", captions=None)
    return evaluate_retrieval(model, held_out, Reading.of(data, model))


def _judge_probe(config: EvalConfig, model: Any, library: str) -> dict[str, float]:
    """Fit a linear probe on the features of the images of ``--train``."""
    # Both parts have the same classes.
    data = {"train": config.train, "val": one_or_all(config.data), "images": config.images}
    transform = image_transform(image_size_of(model), None)
    fit, held_out = (open_labelled(data, part, transform) for part in ("train", "val"))

    # Features as users of the model take them: a CLIP's unit embeddings, a timm model's pooled features.
    encode = encode_pictures if library == "clip" else pool_pictures
    reading = Reading.of(_reading_settings(config), model)
    fit_features, features = (encode(model, part, reading) for part in (fit, held_out))

    # The regression wants float64, which Apple's GPUs lack.
    place = torch.device("cpu") if fit_features.device.type == "mps" else fit_features.device
    tensors = (fit_features, fit.labels, features, held_out.labels)
    return linear_probe(*(tensor.to(place) for tensor in tensors), decay=config.decay)


def one_or_all(sources: Sequence[str]) -> str | list[str]:
    """Return a source that may be a folder or a data set, or several tables."""
    return sources[0] if len(sources) == 1 else list(sources)


def _clip_data(config: EvalConfig, model: Any) -> dict[str, Any]:
    """Return the data settings that a CLIP model asks for; every token id must have an embedding.

    Raises:
        InputError: If the tokenizer has more tokens than the model.
    """
    text = getattr(model, "text", model)
    tokens = vocabulary_size({"tokenizer": config.tokenizer})
    _check_tokenizer(config, config.tokenizer, tokens, text.vocab_size)
    return {
        "images": config.images,
        "tokenizer": config.tokenizer,
        "image_size": model.visual.image_size,
        "context_length": text.context_length,
        **_reading_settings(config),
    }
