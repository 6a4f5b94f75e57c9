"""sliderquant's hot paths on a device without values: nothing in the wrong place, costs as committed."""

from dataclasses import replace

import pytest
from benchmarks.hot_paths import HotPath, count
from benchmarks.sliderquant.cuda import CALIBRATING, PATHS, update_blocks

from tests.cuda.budgets import assert_within_budget, each


@pytest.mark.parametrize("path", each(PATHS))
def test_a_hot_path_stays_within_its_budget(path: HotPath) -> None:
    assert_within_budget("sliderquant", path)


def test_an_update_of_a_window_puts_nothing_in_the_wrong_place() -> None:
    path = HotPath("update", update_blocks, fake="gpu:0", warm_up=1, allow=CALIBRATING)
    cost = count(path, tiny=True)
    # The loss, and whether the gradient is finite.
    assert cost["waits"] == {"window_training.py:update_window": 1, "sampling.py:all_reduce_": 1}
    assert not cost["copies"]


def test_a_packed_product_is_one_launch() -> None:
    packed, dequantized = (replace(path, scaled=1.0) for path in PATHS[:2])
    few, many = (count(path, tiny=True)["launches"] for path in (packed, dequantized))
    # 7 layers in 2 blocks: unpacking takes several launches, the kernel is one.
    assert many - few >= 7 * 2 * 5
