"""com-pt's training steps, growth and evaluation on a fake device: where they are, what they cost."""

from functools import partial

import pytest
import torch
from benchmarks.com_pt.cuda import (
    ALONE,
    BESIDE,
    PATHS,
    WAITS,
    clip_step,
    llama_step,
    predecessor_overhead,
)
from benchmarks.hot_paths import HotPath, Kit, count

from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.method.cost import clip_macs
from com_pt.method.losses import multi_caption_clip_loss
from com_pt.method.metrics import first_own_rank
from tests.cuda.budgets import assert_within_budget, each
from tests.cuda.counter import Counter

STEPS = [
    HotPath(f"{name}, {n} micro-batches", partial(step, micro_batches=n), fake="gpu:0", allow=WAITS)
    for name, step in (("CLIP", clip_step), ("Llama", partial(llama_step, use_cache=False)))
    for n in (1, 2)
]
ONE = [path.name for path in STEPS if "1 micro" in path.name]  # the steps of PATHS have one


@pytest.mark.parametrize("path", each(PATHS, slow=["CLIP step", "Llama step"]))
def test_a_path_costs_what_was_committed_and_copies_nothing(path: HotPath) -> None:
    cost = assert_within_budget("com_pt", path)
    assert not cost["copies"]


@pytest.mark.parametrize("path", each(STEPS, slow=ONE))
def test_a_training_step_stays_on_its_device(path: HotPath) -> None:
    cost = count(path, tiny=True)
    assert not cost["copies"]
    # One for the losses, the gradient and the stop signal together, in an update that is logged.
    assert cost["waits"] == {"stopping.py:read": 1}


@pytest.mark.slow
def test_a_predecessor_adds_little_more_than_its_share_of_flops() -> None:
    """At the paper's batch of 1,024, ViT-L/16 beside ViT-B/16 and alone, one caption an image."""
    alone, beside = (count(path) for path in (ALONE, BESIDE))
    added = predecessor_overhead(alone, beside)
    small, large = (clip_macs(clip_config(f"compt-ViT-{size}-16"), 1) for size in "BL")
    # A forward pass of the small model on top of a forward and two backward passes of the large.
    assert added["FLOPs"] == pytest.approx(small / (3 * large), rel=0.03)
    assert added["device time"] < added["FLOPs"] + 0.02
    assert added["launches"] < 0.3
    # Its weights, of which the products' are in bf16, and one layer's activations at a time.
    weights = sum(p.numel() for p in build_clip(clip_config("compt-ViT-B-16")).parameters())
    assert beside["peak"] - alone["peak"] < 4 * weights
    assert [cost["waits"] for cost in (alone, beside)] == [{"stopping.py:read": 1}] * 2


def test_the_contrastive_loss_never_holds_its_matrix_of_logits() -> None:
    """1,024 images on each of 32 processes, seven captions: one matrix of logits has 4 GiB."""
    images, captions, width = 32 * 1024, 7, 512
    with Counter("gpu:0") as counter:
        device = counter.device
        image, text = (
            torch.empty(shape, device=device, requires_grad=True)
            for shape in ((images, width), (images, captions, width))
        )
        scale = torch.ones((), device=device, requires_grad=True)
        with counter.counting() as cost:
            multi_caption_clip_loss(image, text, scale).backward()
    features = 4 * images * (1 + captions) * width
    logits = 4 * images**2
    assert not cost.waits
    # The features, their gradients, and a few blocks of 64 MiB.
    assert cost.peak < 3 * features + 8 * (64 << 20) < logits


def rank_captions(kit: Kit, tiny: bool):
    """Retrieval on CC3M's validation set: 13,000 images with seven captions each, both ways."""
    images, captions = 13_000, 7
    image_features, text_features = kit.randn(images, 512), kit.randn(captions * images, 512)
    number, owner = kit.randint(images, images), kit.randint(images, captions * images)

    def rank() -> object:
        first_own_rank(image_features, text_features, number, owner)
        return first_own_rank(text_features, image_features, owner, number)

    return rank


def test_retrieval_ranks_in_chunks_below_a_gibibyte_and_waits_for_nothing() -> None:
    cost = count(HotPath("retrieval", rank_captions))
    features = 4 * 512 * (13_000 + 7 * 13_000)
    assert features < cost["peak"] < 2**30
    # All pairs at once would take 4.7 GB for the similarities alone.
    assert cost["written"] > 2 * 4 * 13_000 * 91_000
    assert not cost["copies"]
    assert not cost["waits"]
