"""Anchors and lifts against definitions written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fis_dit.frames import (
    anchors,
    frame_tensors,
    gather_frames,
    lift_attention,
    lift_block,
    neighbours,
    random_anchors,
)

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 5, 21, 31]


def by_definition(frames: int, n: int, r: int) -> list[int]:
    return [f for f in range(frames) if (f - r) % n == 0 or f in (0, frames - 1)]


@pytest.mark.parametrize("frames", LENGTHS)
def test_anchors_are_the_residue_class_and_both_ends(frames: int) -> None:
    for n in range(1, frames + 1):
        for r in range(n):
            want = list(range(frames)) if frames <= 2 or n == 1 else by_definition(frames, n, r)
            assert list(anchors(frames, n, r)) == want


def test_wan_and_hunyuan_lengths_have_the_published_anchor_counts() -> None:
    count = lambda frames, n: [len(anchors(frames, n, r)) for r in range(n)]  # noqa: E731
    assert count(21, 2) == [11, 12]
    assert count(21, 3) == [8, 9, 8]
    assert count(31, 2) == [16, 17]
    assert sorted(count(31, 3)) == [11, 12, 12]


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("boundaries", [True, False])
def test_n_consecutive_sparse_blocks_compute_every_frame(frames: int, boundaries: bool) -> None:
    for n in range(1, frames + 1):
        seen = {f for r in range(5, 5 + n) for f in anchors(frames, n, r, boundaries=boundaries)}
        assert seen == set(range(frames))


@pytest.mark.parametrize("frames", LENGTHS)
def test_equalised_phases_have_equally_many_anchors_and_keep_their_own(frames: int) -> None:
    for n in range(1, frames + 1):
        even = [anchors(frames, n, r, equalize=True) for r in range(n)]
        assert len({len(a) for a in even}) == 1
        assert all(set(anchors(frames, n, r)) <= set(a) for r, a in enumerate(even))


def test_an_equalising_frame_is_one_farthest_from_the_anchors() -> None:
    # Residue 0 of 21 frames has the even ones; every odd frame is one away, the first is taken.
    assert set(anchors(21, 2, 0, equalize=True)) - set(anchors(21, 2, 0)) == {1}


def test_a_stride_beyond_the_length_leaves_the_ends_and_one_frame() -> None:
    assert anchors(7, 100, 3) == (0, 3, 6)


def test_random_anchors_keep_the_ends_and_the_count() -> None:
    drawn = [random_anchors(13, 7, seed) for seed in range(20)]
    assert all(len(a) == 7 and a[0] == 0 and a[-1] == 12 for a in drawn)
    assert len(set(drawn)) > 10


@given(st.integers(3, 24), st.integers(2, 6), st.integers(0, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_interpolation_is_a_partition_of_unity_and_exact_for_linear_motion(
    frames: int, n: int, residue: int, boundaries: bool
) -> None:
    chosen = anchors(frames, n, residue, boundaries=boundaries)
    plan = neighbours(frames, chosen)
    for f, left, right, u in zip(plan.skipped, plan.left, plan.right, plan.weight, strict=True):
        assert 0 <= u <= 1
        a, b = chosen[left], chosen[right]
        inside = chosen[0] < f < chosen[-1]
        assert ((1 - u) * a + u * b == pytest.approx(f)) or not inside
        assert inside or a == b


def residual_by_hand(h: torch.Tensor, y: dict[int, torch.Tensor]) -> torch.Tensor:
    """Section by section, with Python floats: h "f p d", y the outputs of the anchors."""
    out = h.clone()
    keys = sorted(y)
    for f in range(len(h)):
        if f in y:
            out[f] = y[f]
            continue
        a = max(k for k in keys if k < f)
        b = min(k for k in keys if k > f)
        u = (f - a) / (b - a)
        out[f] = h[f] + (1 - u) * (y[a] - h[a]) + u * (y[b] - h[b])
    return out


def test_the_residual_lift_is_the_formula() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 7 * 3, 4, dtype=torch.float64)
    chosen = anchors(7, 3, 1)
    plan = frame_tensors(neighbours(7, chosen), CPU)
    y = torch.randn(2, len(chosen) * 3, 4, dtype=torch.float64)
    got = lift_block(h, y, plan).unflatten(1, (7, 3))
    for sample in range(2):
        outputs = dict(zip(chosen, y.unflatten(1, (-1, 3))[sample], strict=True))
        want = residual_by_hand(h.unflatten(1, (7, 3))[sample], outputs)
        torch.testing.assert_close(got[sample], want, rtol=1e-6, atol=1e-6)


def test_anchors_are_copied_bit_for_bit() -> None:
    torch.manual_seed(0)
    h, y = torch.randn(1, 14, 8), torch.randn(1, 8, 8)
    plan = frame_tensors(neighbours(7, (0, 2, 4, 6)), CPU)
    for lift in ("residual", "hold", "carry", "state"):
        assert torch.equal(gather_frames(lift_block(h, y, plan, lift), plan), y)


def test_the_other_lifts_are_what_their_names_say() -> None:
    h = torch.arange(5.0).view(1, 5, 1)
    y = torch.tensor([10.0, 21.0, 44.0]).view(1, 3, 1)  # at frames 0, 1, 4: residuals 10, 20, 40
    chosen = (0, 1, 4)

    def lifted(lift: str) -> list[float]:
        plan = frame_tensors(neighbours(5, chosen, lift=lift), CPU)
        return lift_block(h, y, plan, lift).flatten().tolist()

    assert lifted("residual") == pytest.approx([10, 21, 2 + 20 + 20 / 3, 3 + 20 + 40 / 3, 44])
    assert lifted("hold") == [10, 21, 22, 43, 44]
    assert lifted("carry") == [10, 21, 2, 3, 44]
    assert lifted("state") == pytest.approx([10, 21, 21 + 23 / 3, 21 + 46 / 3, 44])


def test_without_boundaries_the_outermost_residual_is_held() -> None:
    plan = neighbours(6, anchors(6, 3, 1, boundaries=False))
    assert plan.anchors == (1, 4)
    assert plan.skipped == (0, 2, 3, 5)
    assert [plan.anchors[k] for k in plan.left] == [1, 1, 1, 4]
    assert plan.weight == pytest.approx((0, 1 / 3, 2 / 3, 0))


def test_a_condition_frame_is_computed_but_feeds_no_other() -> None:
    plan = neighbours(7, (0, 3, 6), excluded=(0,))
    sources = {f: (plan.left[i], plan.right[i]) for i, f in enumerate(plan.skipped)}
    assert sources[1] == sources[2] == (1, 1)
    assert sources[4] == (1, 2)


def test_an_attention_output_is_interpolated_itself() -> None:
    plan = frame_tensors(neighbours(3, (0, 2)), CPU)
    out = torch.tensor([1.0, 3.0]).view(1, 2, 1)
    assert lift_attention(out, plan).flatten().tolist() == [1, 2, 3]
    assert lift_attention(out, plan, "carry").flatten().tolist() == [1, 0, 3]


def test_gathering_keeps_whole_frames_along_any_dimension() -> None:
    plan = frame_tensors(neighbours(3, (0, 2)), CPU)
    table = torch.arange(6.0).view(6, 1)
    assert gather_frames(table, plan, 0).flatten().tolist() == [0, 1, 4, 5]
    assert gather_frames(table.T, plan, 1).flatten().tolist() == [0, 1, 4, 5]
