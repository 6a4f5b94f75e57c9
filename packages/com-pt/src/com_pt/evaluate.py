"""Zero-shot classification, retrieval, linear probe, top-1 and perplexity.

The model's forward passes run where the model is, in the caller's autocast if there is one; embeddings
and logits come back as float32, and every metric is computed from them in float32 or better.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

PAIRS = 2**26  # similarities that are ranked at once, which takes about 2 GB


@torch.no_grad()
def evaluate_zero_shot(
    model: Any,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    prompts: Int[Tensor, "classes templates length"],
    *,
    batch: int = 256,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy; a class is the renormalised mean of its unit prompt embeddings."""
    n, templates, length = prompts.shape
    flat = prompts.reshape(n * templates, length)
    words = encoded_texts(model, flat, batch)
    classes = F.normalize(words.reshape(n, templates, -1).mean(1), dim=-1)
    hits = top_k(similarities(encoded_images(model, images, batch), classes), labels)
    return {f"zero-shot {name}": value for name, value in hits.items()}


def top_k(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Top-1 accuracy, and top-5 where there are more than five classes."""
    labels = labels.to(logits.device)
    ranked = logits.argsort(dim=1, descending=True)
    hits = {"top-1": float((ranked[:, 0] == labels).float().mean())}
    if logits.shape[1] > 5:
        hits["top-5"] = float((ranked[:, :5] == labels[:, None]).any(1).float().mean())
    return hits


@torch.no_grad()
def encoded_images(model: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Unit image embeddings [n, d] in float32, on the model's device."""
    device = next(model.parameters()).device
    parts = [model.encode_image(part.to(device)).float() for part in images.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def encoded_texts(model: Any, tokens: Int[Tensor, "n length"], batch: int = 256) -> Tensor:
    """Unit text embeddings [n, d] in float32, on the model's device."""
    device = next(model.parameters()).device
    parts = [model.encode_text(part.to(device)).float() for part in tokens.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


def similarities(one: Float[Tensor, "n d"], other: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Inner products in the embeddings' own precision, also within an autocast."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other.T


@torch.no_grad()
def evaluate_retrieval(
    model: Any,
    images: Float[Tensor, "n c h w"],
    texts: Sequence[Int[Tensor, "k length"]],
    *,
    batch: int = 256,
) -> dict[str, float]:
    """R@1, R@5, R@10 and ranks both ways; images may have different numbers of captions.

    Image to text counts a hit if any of the image's captions is among the first k.
    """
    owner = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(t) for t in texts]))
    words = encoded_texts(model, torch.cat(list(texts)), batch)
    return retrieval_metrics(encoded_images(model, images, batch), words, owner.to(words.device))


def retrieval_metrics(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int[Tensor, " m"]
) -> dict[str, float]:
    """Recalls and ranks from embeddings; ``owner`` is the image that each text belongs to."""
    number = torch.arange(len(images), device=images.device)
    ways = {
        "image to text": first_own_rank(images, texts, number, owner),
        "text to image": first_own_rank(texts, images, owner, number),
    }
    metrics = {}
    for way, ranks in ways.items():
        for k in (1, 5, 10):
            metrics[f"{way} R@{k}"] = float((ranks < k).float().mean())
        metrics[f"{way} mean rank"] = float(ranks.float().mean() + 1)
        metrics[f"{way} median rank"] = float(ranks.float().median() + 1)
    return metrics


def first_own_rank(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    query_owner: Int[Tensor, " n"],
    key_owner: Int[Tensor, " m"],
) -> Int[Tensor, " n"]:
    """Rank, from 0, of the nearest key that has the query's owner; in chunks, for a card's memory."""
    rows = max(1, PAIRS // max(1, len(keys)))
    ranks = []
    for part, owners in zip(queries.split(rows), query_owner.split(rows), strict=True):
        best_first = similarities(part, keys).argsort(dim=1, descending=True)
        own = key_owner[best_first] == owners[:, None]
        ranks.append(own.float().argmax(dim=1))
    return torch.cat(ranks)


def linear_probe(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    *,
    decay: float = 1e-3,
    steps: int = 100,
) -> dict[str, float]:
    """Accuracy of a logistic regression on frozen features (L-BFGS, L2 penalty ``decay``)."""
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    inputs = ((train - mean) / spread).double()
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    weight = torch.zeros(classes, train.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight[:, :-1].T + weight[:, -1]
        loss = F.cross_entropy(logits, train_labels) + decay * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    logits = ((test - mean) / spread).double() @ weight[:, :-1].detach().T + weight[:, -1].detach()
    return {f"linear probe {name}": value for name, value in top_k(logits, test_labels).items()}


@torch.no_grad()
def perplexity(model: Any, tokens: Int[Tensor, "n length"], *, batch: int = 64) -> dict[str, float]:
    """Perplexity and loss (nats a token) of a causal language model on blocks of tokens."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for part in tokens.split(batch):
        logits = model(input_ids=part.to(device)).logits[:, :-1].float()
        target = part[:, 1:].to(device)
        total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        count += target.numel()
    return {"perplexity": math.exp(total / count), "loss": total / count}
