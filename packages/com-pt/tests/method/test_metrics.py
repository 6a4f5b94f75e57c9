"""Evaluation against small cases worked out by hand, and scikit-learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from com_pt_tiny import clip, llama

import com_pt.method.metrics as evaluation
from com_pt.method.metrics import (
    block_losses,
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


def blobs(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes, of different spreads, with a fifth of wrong labels."""
    x = torch.randn(n, 5) * torch.tensor([0.1, 1, 1, 5, 1]) + 2
    y = ((x - 2) / torch.tensor([0.1, 1, 1, 5, 1]) @ torch.randn(5, 3)).argmax(1)
    wrong = torch.rand(n) < 0.2
    return x, torch.where(wrong, torch.randint(3, (n,)), y)


def scikit_learn(x: torch.Tensor, y: torch.Tensor, decay: float):
    """A pipeline whose objective is n times ours: C = 1 / (2 n decay)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = linear_model.LogisticRegression(
        C=1 / (2 * decay * len(x)), max_iter=10000, tol=1e-10
    )
    return make_pipeline(StandardScaler(), regression).fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_the_linear_probe_agrees_with_scikit_learn(decay, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 30)  # ten samples at once
    x, y = blobs()
    predict = evaluation.fit_logistic_regression(x[:150], y[:150], 3, decay=decay, steps=500)
    theirs = scikit_learn(x[:150], y[:150], decay)
    expected = torch.tensor(theirs.predict_proba(x[150:].double().numpy()))
    torch.testing.assert_close(predict(x[150:]).softmax(1), expected, atol=1e-4, rtol=0)

    metrics = linear_probe(x[:150], y[:150], x[150:], y[150:], decay=decay, steps=500)
    score = theirs.score(x[150:].double().numpy(), y[150:].numpy())
    assert metrics["linear probe top-1"] == pytest.approx(score)


def test_the_penalty_is_chosen_on_a_held_out_fifth_of_the_training_data() -> None:
    # Few samples of many features: what fits them best is not what predicts best.
    torch.manual_seed(3)
    x = torch.randn(60, 40)
    y = (x[:, 0] + torch.randn(60) > 0).long()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    choose, fit = order[:12], order[12:]
    scores = {
        decay: scikit_learn(x[fit], y[fit], decay).score(
            x[choose].double().numpy(), y[choose].numpy()
        )
        for decay in evaluation.DECAYS
    }
    best = max(scores.values())
    expected = max(decay for decay, score in scores.items() if score == best)
    assert len(set(scores.values())) > 1

    # The labels of the test samples play no part.
    for test_labels in (torch.zeros(5).long(), torch.ones(5).long()):
        metrics = linear_probe(x, y, torch.randn(5, 40), test_labels, steps=500)
        assert metrics["linear probe decay"] == expected
    assert linear_probe(x, y, x, y, decay=0.5)["linear probe decay"] == 0.5


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11))

    losses = block_losses(Uniform(), torch.randint(0, 11, (3, 6)))
    assert losses.dtype == torch.float64
    metrics = perplexity(losses, 6)
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


@pytest.mark.parametrize("at_once", [1, 40, 2**25])
def test_ranks_are_those_of_a_stable_sort_also_where_scores_are_equal(at_once, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "SIMILARITIES_AT_ONCE", at_once)
    for levels in (2, 3, 100):
        # Few different values: many scores are equal. Image 3 has no caption at all.
        images = torch.randint(levels, (7, 2)).float()
        texts = torch.randint(levels, (15, 2)).float()
        owner = torch.tensor([0, 1, 1, 2, 4, 5, 6, 0, 0, 2, 4, 5, 6, 6, 1])
        for queries, keys, of_query, of_key in (
            (images, texts, torch.arange(7), owner),
            (texts, images, owner, torch.arange(7)),
        ):
            ranks = evaluation.first_own_rank(queries, keys, of_query, of_key)
            order = (queries @ keys.T).argsort(dim=1, descending=True, stable=True)
            for i, row in enumerate(order):
                places = [p for p, key in enumerate(row) if of_key[key] == of_query[i]]
                assert ranks[i] == (places[0] if places else len(keys))

        logits, labels = torch.randint(levels, (20, 6)).float(), torch.randint(6, (20,))
        order = logits.argsort(dim=1, descending=True, stable=True)
        places = (order == labels[:, None]).int().argmax(1)
        assert torch.equal(evaluation.label_ranks(logits, labels), places)


def test_outputs_that_are_all_alike_score_what_chance_does() -> None:
    images, texts, owner = torch.ones(20, 4), torch.ones(40, 4), torch.arange(40) // 2
    metrics = retrieval_metrics(images, texts, owner)
    assert metrics["image to text R@1"] == metrics["text to image R@1"] == 1 / 20
    assert metrics["text to image R@10"] == 10 / 20
    labels = torch.arange(40) % 8
    assert top_k_accuracy(torch.zeros(40, 8), labels) == {"top-1": 1 / 8, "top-5": 5 / 8}


def test_what_is_nan_is_a_miss() -> None:
    images, texts = torch.eye(12), torch.eye(12)
    images[3] = torch.nan
    metrics = retrieval_metrics(images, texts, torch.arange(12))
    assert metrics["image to text R@10"] == metrics["image to text R@1"] == 11 / 12
    logits = torch.eye(12)
    logits[5, 5] = logits[6, 0] = torch.nan
    assert top_k_accuracy(logits, torch.arange(12))["top-1"] == 10 / 12


def test_the_loss_of_a_block_is_that_of_its_next_tokens() -> None:
    model = llama(32)
    tokens = torch.randint(0, 257, (3, 9))
    expected = torch.stack([model(input_ids=t[None], labels=t[None]).loss * 8 for t in tokens])
    ours = block_losses(model, tokens)
    torch.testing.assert_close(ours.float(), expected.detach(), atol=1e-4, rtol=0)
