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

SIMILARITIES_AT_ONCE = 2**26  # similarities that are ranked at once, which takes about 2 GB


@torch.no_grad()
def evaluate_zero_shot(
    model: Any,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    prompts: Int[Tensor, "classes templates length"],
    *,
    batch: int = 256,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy; a class is the renormalised mean of its unit prompts.

    Args:
        model: A CLIP model with ``encode_image`` and ``encode_text``.
        images: Preprocessed images.
        labels: Index of each image's class.
        prompts: Token ids of every class in every template.
        batch: Images or prompts in one forward pass.
    """
    # A class is the mean over templates of unit embeddings, of unit length again.
    classes, templates, length = prompts.shape
    prompt_features = encode_texts(model, prompts.reshape(classes * templates, length), batch)
    class_features = F.normalize(prompt_features.reshape(classes, templates, -1).mean(1), dim=-1)

    # Each image belongs to the nearest class.
    logits = similarities(encode_images(model, images, batch), class_features)
    accuracies = top_k_accuracy(logits, labels)
    return {f"zero-shot {name}": value for name, value in accuracies.items()}


def top_k_accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Return top-1 accuracy in [0, 1], and top-5 where there are more than five classes."""
    labels = labels.to(logits.device)
    ranked = logits.argsort(dim=1, descending=True)
    accuracies = {"top-1": float((ranked[:, 0] == labels).float().mean())}
    if logits.shape[1] > 5:
        accuracies["top-5"] = float((ranked[:, :5] == labels[:, None]).any(1).float().mean())
    return accuracies


@torch.no_grad()
def encode_images(model: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Return unit image embeddings [n, d] in float32, on the model's device."""
    device = next(model.parameters()).device
    parts = [model.encode_image(part.to(device)).float() for part in images.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def encode_texts(model: Any, tokens: Int[Tensor, "n length"], batch: int = 256) -> Tensor:
    """Return unit text embeddings [n, d] in float32, on the model's device."""
    device = next(model.parameters()).device
    parts = [model.encode_text(part.to(device)).float() for part in tokens.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


def similarities(queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return inner products in the embeddings' own precision, also within an autocast."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T


@torch.no_grad()
def evaluate_retrieval(
    model: Any,
    images: Float[Tensor, "n c h w"],
    texts: Sequence[Int[Tensor, "k length"]],
    *,
    batch: int = 256,
) -> dict[str, float]:
    """Return R@1, R@5, R@10 and ranks both ways; images may have different numbers of captions.

    Image to text counts a hit if any of the image's captions is among the first k.
    """
    caption_counts = torch.tensor([len(captions) for captions in texts])
    owner = torch.repeat_interleave(torch.arange(len(texts)), caption_counts)
    text_features = encode_texts(model, torch.cat(list(texts)), batch)
    image_features = encode_images(model, images, batch)
    return retrieval_metrics(image_features, text_features, owner.to(text_features.device))


def retrieval_metrics(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int[Tensor, " m"]
) -> dict[str, float]:
    """Return recalls and ranks (from 1) of embeddings; ``owner`` is the image of each text."""
    # Rank, from 0, of the nearest partner in both directions.
    number = torch.arange(len(images), device=images.device)
    ranks_by_direction = {
        "image to text": first_own_rank(images, texts, number, owner),
        "text to image": first_own_rank(texts, images, owner, number),
    }

    # Recalls and ranks of each direction.
    metrics = {}
    for direction, ranks in ranks_by_direction.items():
        for k in (1, 5, 10):
            metrics[f"{direction} R@{k}"] = float((ranks < k).float().mean())
        metrics[f"{direction} mean rank"] = float(ranks.float().mean() + 1)
        metrics[f"{direction} median rank"] = float(ranks.float().median() + 1)
    return metrics


def first_own_rank(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    query_owner: Int[Tensor, " n"],
    key_owner: Int[Tensor, " m"],
) -> Int[Tensor, " n"]:
    """Return the rank, from 0, of the nearest key that has the query's owner.

    Queries are ranked in chunks, so that the similarities fit into a card's memory.
    """
    rows = max(1, SIMILARITIES_AT_ONCE // max(1, len(keys)))
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
    """Return the accuracy of a logistic regression on frozen features.

    Args:
        train: Features to fit on; their mean and deviation standardise both sets.
        train_labels: Classes of these.
        test: Features to judge on.
        test_labels: Classes of these.
        decay: L2 penalty of the weights.
        steps: Iterations of L-BFGS at most.
    """
    # The regression is convex, and float64 lets L-BFGS come close to its minimum.
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    inputs = ((train - mean) / spread).double()
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    weight = torch.zeros(classes, train.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    # The last column of the weights is the bias, which has no penalty.
    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight[:, :-1].T + weight[:, -1]
        loss = F.cross_entropy(logits, train_labels) + decay * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    # Judge on the other set, standardised alike.
    logits = ((test - mean) / spread).double() @ weight[:, :-1].detach().T + weight[:, -1].detach()
    accuracies = top_k_accuracy(logits, test_labels)
    return {f"linear probe {name}": value for name, value in accuracies.items()}


@torch.no_grad()
def perplexity(model: Any, tokens: Int[Tensor, "n length"], *, batch: int = 64) -> dict[str, float]:
    """Return perplexity and loss (nats a token) of a causal language model on blocks of tokens."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for part in tokens.split(batch):
        logits = model(input_ids=part.to(device)).logits[:, :-1].float()
        target = part[:, 1:].to(device)
        total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        count += target.numel()
    return {"perplexity": math.exp(total / count), "loss": total / count}
