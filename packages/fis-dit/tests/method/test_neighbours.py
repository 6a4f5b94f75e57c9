"""Interpolation sources of skipped frames."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fis_dit.method.anchors import choose_anchors
from fis_dit.method.neighbours import find_neighbours


@given(st.integers(3, 24), st.integers(2, 6), st.integers(0, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_interpolation_is_a_partition_of_unity_and_exact_for_linear_motion(
    frames: int, n: int, residue: int, boundaries: bool
) -> None:
    chosen = choose_anchors(frames, n, residue, boundaries=boundaries)
    plan = find_neighbours(frames, chosen)
    for f, left, right, u in zip(plan.skipped, plan.left, plan.right, plan.weight, strict=True):
        assert 0 <= u <= 1
        a, b = chosen[left], chosen[right]
        inside = chosen[0] < f < chosen[-1]
        assert ((1 - u) * a + u * b == pytest.approx(f)) or not inside
        assert inside or a == b


def test_without_boundaries_the_outermost_residual_is_held() -> None:
    plan = find_neighbours(6, choose_anchors(6, 3, 1, boundaries=False))
    assert plan.anchors == (1, 4)
    assert plan.skipped == (0, 2, 3, 5)
    assert [plan.anchors[k] for k in plan.left] == [1, 1, 1, 4]
    assert plan.weight == pytest.approx((0, 1 / 3, 2 / 3, 0))


def test_a_condition_frame_is_computed_but_feeds_no_other() -> None:
    plan = find_neighbours(7, (0, 3, 6), excluded=(0,))
    sources = {f: (plan.left[i], plan.right[i]) for i, f in enumerate(plan.skipped)}
    assert sources[1] == sources[2] == (1, 1)
    assert sources[4] == (1, 2)
