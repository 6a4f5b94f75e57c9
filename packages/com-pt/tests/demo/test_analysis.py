"""What the comparison says of compute."""

import pytest

from com_pt.demo.analysis import macs_to, schedules
from com_pt.demo.arms import Cell


@pytest.mark.parametrize(
    ("points", "target", "sign", "found"),
    [
        ([(100, 0.2), (10_000, 0.6)], 0.4, 1, (1000, False)),  # half way in log MACs
        ([(10_000, 1.0), (100, 3.0)], 2.0, -1, (1000, False)),  # a loss, in any order
        ([(100, 0.5), (200, 0.6)], 0.5, 1, (100, True)),
        ([(100, 0.2), (200, 0.3)], 0.4, 1, (None, False)),
        ([(100, 0.2), (200, 0.5), (300, 0.4)], 0.5, 1, (200, False)),
    ],
)
def test_compute_to_a_target_lies_between_complete_schedules(points, target, sign, found) -> None:
    macs, bound = macs_to(points, target, sign)
    assert (macs if macs is None else pytest.approx(macs), bound) == found


def test_schedules_of_an_arm_are_its_own_lengths_and_no_other_arm() -> None:
    names = ("B lossless", "B lossless 480", "B lossless + feature", "S lossless")
    cells = [Cell(name, "B", "", 1, 1, 0.0, None, 0.0, 0.0, 0.0, 1) for name in names]
    assert schedules(cells, "B lossless") == ["B lossless", "B lossless 480"]
