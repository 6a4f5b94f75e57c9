"""scalekd's hot paths on a device without values: nothing in the wrong place, costs as committed."""

from dataclasses import replace
from functools import partial

import pytest
from benchmarks.hot_paths import HotPath, count
from benchmarks.scalekd.cuda import PATHS, cached_update, update

from tests.cuda.budgets import assert_within_budget, each

# A step is counted on a tiny model too, and contains the plain one.
SLOW = ("one step", "plain student")


@pytest.mark.parametrize("path", each(PATHS, slow=SLOW))
def test_a_hot_path_stays_within_its_budget(path: HotPath) -> None:
    assert_within_budget("scalekd", path)


@pytest.mark.parametrize("build", [update, cached_update])
def test_an_update_puts_nothing_in_the_wrong_place(build) -> None:
    path = replace(PATHS[0], build=partial(build, amp=None), fake="gpu:0")
    cost = count(path, tiny=True)
    # Each of the seven terms, their sum and the norm of the gradient are looked at.
    assert sum(cost["waits"].values()) == 9
    assert not cost["copies"]
