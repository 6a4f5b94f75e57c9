"""Which layer comes from which."""

import pytest

from com_pt.errors import GrowthError
from com_pt.method.matching import depth_map
from com_pt.method_config import GrowthSettings


def test_depth_maps_are_those_of_the_paper() -> None:
    assert depth_map(12, 24, "interleave") == [j // 2 for j in range(24)]
    assert depth_map(6, 18, "interleave") == [j // 3 for j in range(18)]
    assert depth_map(12, 16, "interleave")[:8] == [0, 0, 1, 2, 3, 3, 4, 5]
    assert depth_map(3, 7, "stack") == [0, 1, 2, 0, 1, 2, 0]
    assert depth_map(3, 5, "leading") == [0, 1, 2, None, None]


def test_only_rules_that_round_are_strict() -> None:
    for rule in ("interleave", "stack", "identity"):
        with pytest.raises(GrowthError, match="5 layers are no multiple of 3"):
            depth_map(3, 5, rule, strict=True)
    assert depth_map(3, 5, "leading", strict=True) == depth_map(3, 5, "leading")


def test_each_mode_has_its_own_depth_rule_unless_one_is_given() -> None:
    usual = {"embed": "interleave", "random": "interleave", "lossless": "identity",
             "official": "released"}  # fmt: skip
    for mode, rule in usual.items():
        assert GrowthSettings(mode=mode).depth_rule == rule
        assert GrowthSettings(mode=mode, depth="stack").depth_rule == "stack"
