"""Evaluation against small cases worked out by hand, and scikit-learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from com_pt_tiny import clip

import com_pt.method.metrics as evaluation
from com_pt.method.metrics import (
    evaluate_zero_shot,
    linear_probe,
    perplexity,
    retrieval_metrics,
    top_k_accuracy,
)


class Towers(torch.nn.Module):
    """Embeddings that are looked up, so that results can be written by hand."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        super().__init__()
        self.images, self.texts = torch.nn.Parameter(images), torch.nn.Parameter(texts)

    def encode_image(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize(self.images[x[:, 0, 0, 0].long()], dim=-1)

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize(self.texts[ids[:, 0]], dim=-1)


def test_a_class_is_the_renormalised_mean_of_its_unit_prompts() -> None:
    # Class 0: prompts along x (long) and y; class 1: twice along z.
    texts = torch.tensor([[100.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 2]])
    # Image 0 has 2 / sqrt 2 = 1.41 to class 0 against 1.2, but only 1 to the mean before its norm.
    # Image 1 has 0.71 to class 0 against 0.8, and would have 1 if the long prompt had its way.
    images = torch.tensor([[1.0, 1, 1.2], [1, 0, 0.8]])
    model = Towers(images, texts)
    prompts = torch.tensor([[[0], [1]], [[2], [3]]])
    pixels = torch.arange(2.0).reshape(2, 1, 1, 1)
    metrics = evaluate_zero_shot(model, pixels, torch.tensor([0, 1]), prompts)
    assert metrics["zero-shot top-1"] == 1


def test_top_5_counts_the_five_best() -> None:
    logits = torch.arange(7.0).repeat(2, 1)
    assert top_k_accuracy(logits, torch.tensor([2, 1])) == {"top-1": 0, "top-5": 0.5}


def test_retrieval_counts_a_hit_of_any_caption_of_an_image() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[0, 1, 0.0], [0.9, 0, 0], [0, 0.8, 0], [0, 0, 1.0]])
    owner = torch.tensor([0, 0, 1, 2])  # image 0 has a wrong and a right caption
    metrics = retrieval_metrics(images, texts, owner)
    assert metrics["image to text R@1"] == pytest.approx(
        2 / 3
    )  # image 1 finds a caption of image 0
    assert metrics["text to image R@1"] == pytest.approx(3 / 4)
    assert metrics["image to text mean rank"] == pytest.approx((1 + 2 + 1) / 3)
    assert metrics["image to text R@5"] == 1


def test_the_linear_probe_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = torch.randn(120, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    ours = linear_probe(x[:80], y[:80], x[80:], y[80:], decay=1e-3)["linear probe top-1"]
    z = (x - x[:80].mean(0)) / x[:80].std(0)
    theirs = linear_model.LogisticRegression(C=1 / (2 * 1e-3 * 80), max_iter=1000)
    theirs.fit(z[:80].numpy(), y[:80].numpy())
    assert ours == pytest.approx(theirs.score(z[80:].numpy(), y[80:].numpy()), abs=0.026)


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11))

    metrics = perplexity(Uniform(), torch.randint(0, 11, (3, 6)), batch=2)
    assert metrics["perplexity"] == pytest.approx(11)
    assert metrics["loss"] == pytest.approx(math.log(11))


def test_metrics_are_float32_within_an_autocast() -> None:
    model = clip(32)
    images, tokens = torch.randn(6, 3, 8, 16), torch.randint(1, 9, (6, 8))
    exact = evaluation.encode_images(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = evaluation.encode_images(model, images)
        words = evaluation.encode_texts(model, tokens)
        products = evaluation.similarities(pictures, words)
    # The forward pass is in bfloat16, what follows is not.
    assert not torch.equal(pictures, exact)
    assert {t.dtype for t in (pictures, words, products)} == {torch.float32}
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)
    assert torch.equal(products, pictures @ words.T)


def test_ranking_in_chunks_is_ranking_at_once(monkeypatch) -> None:
    images, texts = torch.randn(7, 4), torch.randn(15, 4)
    owner = torch.arange(15) // 2 % 7
    whole = evaluation.retrieval_metrics(images, texts, owner)
    monkeypatch.setattr(
        evaluation, "SIMILARITIES_AT_ONCE", 32
    )  # two images, or four texts, at once
    assert evaluation.retrieval_metrics(images, texts, owner) == pytest.approx(whole)
