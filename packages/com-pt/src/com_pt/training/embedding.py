"""Embeddings and hits of whole held-out sets, streamed through a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from com_pt.method.metrics import (
    block_losses,
    embed_images,
    embed_texts,
    label_ranks,
    retrieval_metrics,
)
from com_pt.training.streaming import HeldOutPictures, Reading, stream_rows


def encode_pictures(model: Any, data: Any, reading: Reading) -> Tensor:
    """Return the unit embeddings [n, d] of the pictures of ``data`` by a CLIP model."""
    return stream_rows(
        lambda batch: embed_images(model, batch),
        HeldOutPictures(data),
        reading,
        "encoding pictures",
    )


def encode_texts(
    model: Any,
    texts: Sequence[str],
    tokenize: Callable[[list[str]], Tensor],
    reading: Reading,
    what: str = "captions",
) -> Tensor:
    """Return the unit embeddings [n, d] of texts by a CLIP model."""
    return stream_rows(
        lambda batch: embed_texts(model, batch), texts, reading, f"encoding {what}", tokenize
    )


def evaluate_retrieval(model: Any, data: Any, reading: Reading) -> dict[str, float]:
    """Return recalls and ranks both ways; images may have different numbers of captions."""
    counts = torch.tensor([len(captions) for captions in data.texts])
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    captions = [text for of_image in data.texts for text in of_image]

    text_features = encode_texts(model, captions, data.tokenize, reading)
    image_features = encode_pictures(model, data, reading)
    return retrieval_metrics(image_features, text_features, owner.to(text_features.device))


def rank_labels(model: Any, data: Any, reading: Reading) -> Tensor:
    """Return the rank, from 0, of the label of each picture of ``data`` by a classifier."""

    @torch.no_grad()
    def compute(batch: Any) -> Tensor:
        pictures, own = (part.to(reading.device, non_blocking=True) for part in batch)
        return label_ranks(model(pictures).float(), own)

    return stream_rows(compute, HeldOutPictures(data, data.labels), reading, "classifying pictures")


def pool_pictures(model: Any, data: Any, reading: Reading) -> Tensor:
    """Return the features [n, w] of the pictures before the classifier of a timm model."""

    @torch.no_grad()
    def compute(batch: Tensor) -> Tensor:
        features = model.forward_features(batch.to(reading.device, non_blocking=True))
        return model.forward_head(features, pre_logits=True).float()

    return stream_rows(compute, HeldOutPictures(data), reading, "encoding pictures")


def stream_losses(model: Any, blocks: Any, reading: Reading) -> Tensor:
    """Return the loss of each block of tokens by a causal language model, in nats and float64."""
    return stream_rows(
        lambda batch: block_losses(model, batch), blocks, reading, "reading blocks", torch.stack
    )
