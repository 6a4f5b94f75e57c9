"""Anchors against their definition."""

import pytest

from fis_dit.method.anchors import choose_anchors, draw_random_anchors

LENGTHS = [1, 2, 3, 5, 21, 31]


def by_definition(frames: int, n: int, r: int) -> list[int]:
    return [f for f in range(frames) if (f - r) % n == 0 or f in (0, frames - 1)]


@pytest.mark.parametrize("frames", LENGTHS)
def test_anchors_are_the_residue_class_and_both_ends(frames: int) -> None:
    for n in range(1, frames + 1):
        for r in range(n):
            want = list(range(frames)) if frames <= 2 or n == 1 else by_definition(frames, n, r)
            assert list(choose_anchors(frames, n, r)) == want


def test_wan_and_hunyuan_lengths_have_the_published_anchor_counts() -> None:
    count = lambda frames, n: [len(choose_anchors(frames, n, r)) for r in range(n)]  # noqa: E731
    assert count(21, 2) == [11, 12]
    assert count(21, 3) == [8, 9, 8]
    assert count(31, 2) == [16, 17]
    assert sorted(count(31, 3)) == [11, 12, 12]


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("boundaries", [True, False])
def test_n_consecutive_sparse_blocks_compute_every_frame(frames: int, boundaries: bool) -> None:
    for n in range(1, frames + 1):
        seen = {
            f for r in range(5, 5 + n) for f in choose_anchors(frames, n, r, boundaries=boundaries)
        }
        assert seen == set(range(frames))


@pytest.mark.parametrize("frames", LENGTHS)
def test_equalised_phases_have_equally_many_anchors_and_keep_their_own(frames: int) -> None:
    for n in range(1, frames + 1):
        even = [choose_anchors(frames, n, r, equalize=True) for r in range(n)]
        assert len({len(a) for a in even}) == 1
        assert all(set(choose_anchors(frames, n, r)) <= set(a) for r, a in enumerate(even))


def test_an_equalising_frame_is_one_farthest_from_the_anchors() -> None:
    # Residue 0 of 21 frames has the even ones; every odd frame is one away, the first is taken.
    assert set(choose_anchors(21, 2, 0, equalize=True)) - set(choose_anchors(21, 2, 0)) == {1}


def test_a_stride_beyond_the_length_leaves_the_ends_and_one_frame() -> None:
    assert choose_anchors(7, 100, 3) == (0, 3, 6)


def test_random_anchors_keep_the_ends_and_the_count() -> None:
    drawn = [draw_random_anchors(13, 7, seed) for seed in range(20)]
    assert all(len(a) == 7 and a[0] == 0 and a[-1] == 12 for a in drawn)
    assert len(set(drawn)) > 10
