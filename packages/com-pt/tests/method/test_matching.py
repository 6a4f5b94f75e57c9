"""Which layer comes from which."""

from com_pt.method.matching import depth_map


def test_depth_maps_are_those_of_the_paper() -> None:
    assert depth_map(12, 24, "interleave") == [j // 2 for j in range(24)]
    assert depth_map(6, 18, "interleave") == [j // 3 for j in range(18)]
    assert depth_map(12, 16, "interleave")[:8] == [0, 0, 1, 2, 3, 3, 4, 5]
    assert depth_map(3, 7, "stack") == [0, 1, 2, 0, 1, 2, 0]
