"""The learning rate of a stage."""

import pytest

from com_pt.training.schedule import learning_rate


def test_the_rate_warms_up_for_a_tenth_at_most_and_ends_at_the_floor() -> None:
    rates = [learning_rate(step, 100, 1000, 1.0, 0.1) for step in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
