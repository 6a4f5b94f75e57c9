"""com-pt's training steps, growth and evaluation on a fake device: where they are, what they cost."""

from functools import partial

import pytest
from benchmarks.com_pt.cuda import PATHS, WAITS, clip_step, llama_step
from benchmarks.hot_paths import HotPath, Kit, count

from com_pt.method.metrics import first_own_rank
from tests.cuda.budgets import assert_within_budget, each

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
    # One wait for each of two loss terms, their sum and the gradients; one for the progress line.
    assert cost["waits"] == {"stopping.py:check_finite": 4, "cuda.py:update": 1}


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
