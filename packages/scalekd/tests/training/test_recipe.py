"""The recipes are the paper's, and their losses what they say."""

import pytest
import torch
from torch.nn import functional as F

from scalekd.config import TrainConfig
from scalekd.training.recipe import TaskLoss, load_recipe, resolve_recipe


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "optimizer", "lr", "decay", "clip", "ema"),
    [
        ("traditional", 100, 256, "sgd", 0.1, 1e-4, 0, 0),
        ("adv-r50", 300, 2048, "lamb", 5e-3, 0.02, 5, 0),
        ("adv-vit", 300, 1024, "adamw", 1e-3, 0.05, 5, 0.9999),
        ("adv-mixer", 300, 1536, "adamw", 7e-4, 0.067, 1, 0.9999),
        ("mbv1", 300, 2048, "lamb", 2e-3, 0.004, 0, 0),
    ],
)
def test_a_recipe_has_the_published_values(
    name, epochs, batch, optimizer, lr, decay, clip, ema
) -> None:
    r = load_recipe(name)
    assert (r.epochs, r.batch_size, r.optimizer, r.lr) == (epochs, batch, optimizer, lr)
    assert (r.weight_decay, r.clip, r.ema) == (decay, clip, ema)
    # LAMB and SGD decay everything, AdamW leaves norms and biases out.
    assert r.decay_all == (optimizer != "adamw")


def test_the_command_line_wins_over_the_recipe_and_steps_scale_with_the_epochs() -> None:
    config = TrainConfig(data_dir="x", epochs=10, lr=0.3, batch_size=64)
    recipe = resolve_recipe(config)
    assert (recipe.epochs, recipe.lr, recipe.batch_size) == (10, 0.3, 64)
    assert recipe.milestones == (3, 6, 9)


@pytest.mark.parametrize("name", ["adv-r50", "adv-vit", "adv-mixer", "mbv1"])
def test_no_magnitude_that_a_recipe_can_draw_breaks_the_augmentation(name: str) -> None:
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    drawn = rand_augment_transform(load_recipe(name).auto_augment, {})
    posterize = next(op for op in drawn.ops if op.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for _ in range(300):
        drawn_image = posterize(image)
        assert drawn_image.size == image.size
        # Four bits of a channel are kept at the most, so the lower four are zero.
        assert all(low % 16 == 0 for band in drawn_image.getextrema() for low in band)


def test_the_rate_scales_with_the_batch_only_when_asked() -> None:
    plain = TrainConfig(data_dir="x", batch_size=64)
    scaled = TrainConfig(data_dir="x", batch_size=64, scale_lr=True)
    assert resolve_recipe(plain).lr == 0.1
    assert resolve_recipe(scaled).lr == pytest.approx(0.1 * 64 / 256)


def test_binary_cross_entropy_is_summed_over_classes() -> None:
    logits, labels = torch.randn(4, 10, dtype=torch.float64).float(), torch.tensor([1, 2, 3, 9])
    loss = TaskLoss(load_recipe("adv-r50"))(logits, labels)
    p = logits.double().sigmoid()
    one = F.one_hot(labels, 10).double()
    by_hand = -(one * p.log() + (1 - one) * (1 - p).log()).sum(1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    soft = TaskLoss(load_recipe("adv-r50"))(logits, one.float())
    assert soft.item() == pytest.approx(loss.item())


def test_smoothing_is_the_recipes() -> None:
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    smooth = TaskLoss(load_recipe("adv-vit"))(logits, labels)
    target = 0.9 * F.one_hot(labels, 10) + 0.01
    assert smooth.item() == pytest.approx(
        -(target * logits.log_softmax(-1)).sum(1).mean().item(), rel=1e-5
    )
