"""com-pt's training steps, growth and evaluation on a fake device: where they are, what they cost."""

from functools import partial

import pytest
from benchmarks.com_pt.cuda import PATHS, WAITS, clip_step, llama_step
from benchmarks.hot_paths import HotPath, count

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
