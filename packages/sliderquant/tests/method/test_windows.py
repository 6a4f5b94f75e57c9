"""The window schedule against the paper's example and against its own promises."""

import pytest

from effml_common.errors import ConfigError
from sliderquant.config import WindowConfig
from sliderquant.method.windows import block_visits, make_windows, parse_windows, slider_windows


def test_schedule_of_32_blocks_is_the_papers() -> None:
    windows = slider_windows(32, 4, 4, 2, 1)
    assert windows[:4] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert windows[4:29] == [[k, k + 1] for k in range(3, 28)]
    assert windows[29:] == [[28, 29, 30, 31], [29, 30, 31], [30, 31], [31]]
    assert len(windows) == 33
    assert block_visits(windows) == 70
    visits = [sum(block in window for window in windows) for block in range(32)]
    assert visits == [4, 3, 2] + [2] * 27 + [3, 4]


@pytest.mark.parametrize(
    ("schedule", "options", "windows", "visits"),
    [("fixed", {}, 31, 62), ("fixed", {"window": 4}, 29, 116), ("block", {}, 32, 32)],
)
def test_baseline_schedules_have_the_specified_cost(schedule, options, windows, visits) -> None:
    made = make_windows(32, WindowConfig(schedule=schedule, **options))
    assert (len(made), block_visits(made)) == (windows, visits)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [[0]]),
        (2, [[0], [0, 1], [1]]),
        (5, [[0], [0, 1], [0, 1, 2], [2, 3], [3, 4], [4]]),
        (
            8,
            [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4], [4, 5, 6, 7], [5, 6, 7], [6, 7], [7]],
        ),
    ],
)
def test_small_models_are_halved_between_both_ends(layers, expected) -> None:
    assert make_windows(layers, WindowConfig()) == expected


@pytest.mark.parametrize("layers", range(1, 41))
def test_every_schedule_moves_forward_and_covers_every_block(layers) -> None:
    for shallow in range(6):
        for deep in range(6):
            for size in range(1, 6):
                for stride in range(1, size + 1):
                    windows = slider_windows(layers, shallow, deep, size, stride)
                    starts = [window[0] for window in windows]
                    assert starts == sorted(starts)
                    assert all(w == list(range(w[0], w[-1] + 1)) for w in windows)
                    assert {b for w in windows for b in w} == set(range(layers))
                    assert windows[-1][-1] == layers - 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2-5,0-3", "go backwards"),
        ("0-3,5-7", "no window holds block 4"),
        ("0-3,2-9", "last block is 7"),
        ("0-7,2-5", "must end at block 7"),
        ("3-1", "no range"),
        ("0--1", "no range"),
    ],
)
def test_bad_user_windows_are_refused(text, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_windows(8, WindowConfig(schedule=text))


def test_user_windows_are_read_with_both_ends() -> None:
    assert parse_windows("0-2, 2,3-4") == [[0, 1, 2], [2], [3, 4]]
