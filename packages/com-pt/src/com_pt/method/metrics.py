"""Zero-shot classification, retrieval, linear probe, top-1 and perplexity.

The model's forward passes run where the model is, in the caller's autocast if there is one; embeddings
and logits come back as float32, and every metric is computed from them in float32 or better.

Ties rank by number: of classes or keys with the same score the first comes first. So the metrics are the
same on every device, and a model whose outputs are all alike scores what chance does. What is NaN counts
as a miss.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIMILARITIES_AT_ONCE = 2**25  # similarities that are ranked at once, which takes about 350 MB
LOGITS_AT_ONCE = 2**24  # logits of a probe that are computed at once, which takes about 400 MB
DECAYS = tuple(10.0**k for k in range(-6, 1))  # L2 penalties that a probe chooses from
CHOOSING_SHARE = 0.2  # of the training samples, on which the penalty is chosen


@torch.no_grad()
def embed_images(model: Any, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Return unit image embeddings in float32, on the model's device."""
    device = next(model.parameters()).device
    return F.normalize(model.encode_image(images.to(device, non_blocking=True)).float(), dim=-1)


@torch.no_grad()
def embed_texts(model: Any, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n d"]:
    """Return unit text embeddings in float32, on the model's device."""
    device = next(model.parameters()).device
    return F.normalize(model.encode_text(tokens.to(device, non_blocking=True)).float(), dim=-1)


def encode_images(model: Any, images: Tensor, batch: int = 256) -> Float[Tensor, "n d"]:
    """Return the unit embeddings of images that are in memory, computed batch by batch."""
    return torch.cat([embed_images(model, part) for part in images.split(batch)])


def encode_texts(model: Any, tokens: Tensor, batch: int = 256) -> Float[Tensor, "n d"]:
    """Return the unit embeddings of texts that are in memory, computed batch by batch."""
    return torch.cat([embed_texts(model, part) for part in tokens.split(batch)])


def similarities(queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return inner products in the embeddings' own precision, also within an autocast."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T


def evaluate_zero_shot(
    model: Any,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    prompts: Int[Tensor, "classes templates length"],
    *,
    batch: int = 256,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy on images that are in memory.

    Args:
        model: A CLIP model with ``encode_image`` and ``encode_text``.
        images: Preprocessed images.
        labels: Index of each image's class.
        prompts: Token ids of every class in every template.
        batch: Images or prompts in one forward pass.
    """
    prompt_features = encode_texts(model, prompts.flatten(0, 1), batch)
    class_features = class_embeddings(prompt_features, prompts.shape[1])
    ranks = zero_shot_ranks(encode_images(model, images, batch), class_features, labels)
    return name_accuracies(ranks, prompts.shape[0], "zero-shot ")


def class_embeddings(prompts: Float[Tensor, "n d"], templates: int) -> Float[Tensor, "classes d"]:
    """Return a unit embedding of each class: the renormalised mean of its unit prompts.

    Args:
        prompts: Unit embeddings, all templates of the first class first.
        templates: Prompts of a class.
    """
    return F.normalize(prompts.unflatten(0, (-1, templates)).mean(1), dim=-1)


def zero_shot_ranks(
    images: Float[Tensor, "n d"], classes: Float[Tensor, "c d"], labels: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """Return the rank, from 0, of each image's own class among all classes by similarity."""
    rows = max(1, SIMILARITIES_AT_ONCE // len(classes))
    parts = zip(images.split(rows), labels.to(images.device).split(rows), strict=True)
    return torch.cat([label_ranks(similarities(part, classes), own) for part, own in parts])


def label_ranks(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the rank, from 0, of each label; equal logits rank by the number of their class."""
    labels = labels.to(logits.device)[:, None]
    own = logits.gather(1, labels)
    is_lower = torch.arange(logits.shape[1], device=logits.device) < labels
    # Not "greater": comparisons with NaN are false, and NaN must not rank last.
    return (~(logits <= own) | (is_lower & (logits == own))).sum(1)


def top_k_accuracy(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Return top-1 accuracy in [0, 1], and top-5 where there are more than five classes."""
    return name_accuracies(label_ranks(logits, labels), logits.shape[1])


def name_accuracies(ranks: Int[Tensor, " n"], classes: int, prefix: str = "") -> dict[str, float]:
    """Return top-1 accuracy in [0, 1] of label ranks, and top-5 where there are more classes."""
    accuracies = {f"{prefix}top-1": _share_below(ranks, 1)}
    if classes > 5:
        accuracies[f"{prefix}top-5"] = _share_below(ranks, 5)
    return accuracies


def _share_below(ranks: Int[Tensor, " n"], k: int) -> float:
    return int((ranks < k).sum()) / len(ranks)


@torch.no_grad()
def retrieval_metrics(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int[Tensor, " m"]
) -> dict[str, float]:
    """Return recalls and ranks (from 1) of embeddings both ways.

    Image to text counts a hit if any of the image's captions is among the first k.

    Args:
        images: Unit embeddings of the images.
        texts: Unit embeddings of all captions; images may have different numbers of them.
        owner: Index of each caption's image.
    """
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
            metrics[f"{direction} R@{k}"] = _share_below(ranks, k)
        metrics[f"{direction} mean rank"] = float(ranks.double().mean() + 1)
        metrics[f"{direction} median rank"] = float(ranks.double().median() + 1)
    return metrics


def first_own_rank(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    query_owner: Int[Tensor, " n"],
    key_owner: Int[Tensor, " m"],
) -> Int[Tensor, " n"]:
    """Return the rank, from 0, of the nearest key that has the query's owner.

    It is the number of other keys that are nearer, or as near and before it. Nothing is sorted, and
    queries are ranked in chunks, so that the similarities fit into a card's memory.
    """
    rows = max(1, SIMILARITIES_AT_ONCE // max(1, len(keys)))
    number = torch.arange(len(keys), device=keys.device, dtype=torch.int32)
    ranks = []
    for part, owners in zip(queries.split(rows), query_owner.split(rows), strict=True):
        # The nearest key of the query's own; of several that are as near, the first.
        scores = similarities(part, keys)
        is_foreign = key_owner != owners[:, None]
        best = scores.masked_fill(is_foreign, -math.inf).amax(dim=1, keepdim=True)
        ties = scores == best
        first = number.where(ties & ~is_foreign, len(keys)).amin(dim=1, keepdim=True)

        # Not "greater": comparisons with NaN are false, and NaN must not rank last.
        is_ahead = ~(scores <= best) | ties.logical_and_(number < first)
        ranks.append(is_ahead.logical_and_(is_foreign).sum(dim=1))
    return torch.cat(ranks)


def linear_probe(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    *,
    decay: float | None = None,
    steps: int = 100,
) -> dict[str, float]:
    """Return the accuracy of a logistic regression on frozen features, and its L2 penalty.

    The test samples take no part in the choice of the penalty: as in CLIP's protocol, it is the one
    of ``DECAYS`` that is best on a held-out fifth of the training samples, and the regression is
    then fitted on all of them. Of equally good ones the strongest is taken.

    Args:
        train: Features to fit on; their mean and deviation standardise both sets.
        train_labels: Classes of these.
        test: Features to judge on.
        test_labels: Classes of these.
        decay: L2 penalty of the weights: the loss is the mean cross-entropy plus this times the sum
            of their squares. None chooses it.
        steps: Iterations of L-BFGS at most.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    if decay is None:
        decay = choose_decay(train, train_labels, classes, steps=steps)
    predict = fit_logistic_regression(train, train_labels, classes, decay=decay, steps=steps)
    ranks = label_ranks(predict(test), test_labels)
    return {**name_accuracies(ranks, classes, "linear probe "), "linear probe decay": decay}


def choose_decay(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, *, steps: int = 100
) -> float:
    """Return the penalty of ``DECAYS`` with the best top-1 accuracy on a held-out fifth."""
    # The same fifth for every model, whatever order the samples come in.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = max(1, round(CHOOSING_SHARE * len(labels)))
    choose, fit = order[:held_out].to(labels.device), order[held_out:].to(labels.device)

    # From the strongest on; a weaker penalty must be better, not as good.
    best_decay, most_hits = DECAYS[-1], -1
    for decay in reversed(DECAYS):
        predict = fit_logistic_regression(
            features[fit], labels[fit], classes, decay=decay, steps=steps
        )
        hits = int((label_ranks(predict(features[choose]), labels[choose]) == 0).sum())
        if hits > most_hits:
            best_decay, most_hits = decay, hits
    return best_decay


def fit_logistic_regression(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    *,
    decay: float,
    steps: int = 100,
) -> Callable[[Tensor], Tensor]:
    """Fit a logistic regression by L-BFGS, and return a function from features to logits.

    Args:
        features: Features; their mean and deviation standardise whatever is predicted later, too.
        labels: Their classes.
        classes: Number of classes.
        decay: L2 penalty of the weights; the bias has none.
        steps: Iterations at most.
    """
    # The problem is convex, and float64 lets L-BFGS come close to its minimum.
    mean, spread = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    kind = {"dtype": torch.float64, "device": features.device}
    weight = torch.zeros(classes, features.shape[1], **kind, requires_grad=True)
    bias = torch.zeros(classes, **kind, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def predict(rows: Tensor) -> Tensor:
        return F.linear(((rows - mean) / spread).double(), weight, bias)

    # Gradients add up over chunks, so that the logits fit into memory.
    chunk = max(1, LOGITS_AT_ONCE // classes)

    def closure() -> float:
        optimizer.zero_grad()
        loss = decay * weight.square().sum()
        loss.backward()
        total = loss.detach()
        for rows, targets in zip(features.split(chunk), labels.split(chunk), strict=True):
            part = F.cross_entropy(predict(rows), targets, reduction="sum") / len(labels)
            part.backward()
            total += part.detach()
        return float(total)

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(closure)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    return predict


@torch.no_grad()
def block_losses(model: Any, tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
    """Return the loss of a causal language model on each block of tokens, in nats and float64."""
    tokens = tokens.to(next(model.parameters()).device, non_blocking=True)
    logits = model(input_ids=tokens).logits[:, :-1]
    # Block by block: a large vocabulary makes float32 logits of a batch much larger than the model.
    losses = [
        F.cross_entropy(block.float(), target, reduction="none").double().sum()
        for block, target in zip(logits, tokens[:, 1:], strict=True)
    ]
    return torch.stack(losses)


def perplexity(losses: Float[Tensor, " n"], length: int) -> dict[str, float]:
    """Return perplexity and loss (nats a token) of the losses of blocks of ``length`` tokens."""
    loss = losses.sum() / (len(losses) * (length - 1))
    return {"perplexity": float(loss.exp()), "loss": float(loss)}
