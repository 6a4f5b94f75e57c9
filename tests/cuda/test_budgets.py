"""A budget fails when a cost changes, says what changed, and covers every path."""

import copy
import importlib
import sys
from typing import Any

import pytest
from benchmarks.hot_paths import MODULES, HotPath

from tests.cuda import renew
from tests.cuda.budgets import assert_within_budget, budgets, differences

COST: dict[str, Any] = {
    "launches": 174,
    "read": 1000,
    "written": 500,
    "peak": 2000,
    "device_ms": 2.0,
    "step_ms": 3.0,
    "flops": {"bfloat16": 4000},
    "waits": {"trainer.py:step": 1},
    "copies": {},
    "fake": "cuda:0",
    "scaled": 1.0,
}


def changed(figure: str, value: Any, row: str | None = None) -> dict[str, Any]:
    """The cost with another value of one figure, or of one row of it."""
    cost = copy.deepcopy(COST)
    if row is None:
        cost[figure] = value
    else:
        cost[figure][row] = value
    return cost


@pytest.mark.parametrize("module", MODULES)
def test_every_path_has_a_budget_and_every_budget_a_path(module: str) -> None:
    names = [path.name for path in importlib.import_module(f"benchmarks.{module}.cuda").PATHS]
    assert list(budgets()[module]) == names, f"run python -m tests.cuda.renew {module}"


def test_what_differs_by_less_than_a_tenth_is_within_its_budget() -> None:
    assert differences(changed("launches", 190), COST) == []
    assert differences(changed("flops", 3601, "bfloat16"), COST) == []


@pytest.mark.parametrize(
    ("cost", "line"),
    [
        (changed("launches", 348), "launches: 174 -> 348 (+100%)"),
        (changed("read", 500), "read: 1,000 -> 500 (-50%)"),
        (changed("device_ms", 4.0), "device_ms: 2.0 -> 4.0 (+100%)"),
        (changed("flops", 8000, "bfloat16"), "flops bfloat16: 4,000 -> 8,000 (+100%)"),
        (changed("flops", 1, "float32"), "flops float32: 0 -> 1"),
        (changed("waits", 2, "trainer.py:step"), "waits trainer.py:step: 1 -> 2 (+100%)"),
        (changed("waits", 1, "loss.py:item"), "waits loss.py:item: 0 -> 1"),
        (changed("waits", {}), "waits trainer.py:step: 1 -> 0 (-100%)"),
        (changed("copies", 3, "to host loss.py:cpu"), "copies to host loss.py:cpu: 0 -> 3"),
        (changed("fake", "cpu"), "fake: cuda:0 -> cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changed_is_named_with_its_old_and_new_figure(cost: dict[str, Any], line: str) -> None:
    assert differences(cost, COST) == [line]


def test_a_figure_that_was_zero_may_not_grow_and_may_stay() -> None:
    nothing = changed("written", 0)
    assert differences(nothing, nothing) == []
    assert differences(changed("written", 1), nothing) == ["written: 0 -> 1"]


def test_a_path_without_a_budget_says_how_to_get_one() -> None:
    with pytest.raises(AssertionError, match=r"no budget; .*tests\.cuda\.renew scalekd"):
        assert_within_budget("scalekd", HotPath("new", lambda kit, tiny: lambda: None))


def test_an_unknown_package_is_refused_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["renew", "scale-kd"])
    with pytest.raises(SystemExit, match="2"):
        renew.main()
    assert "no package called scale_kd; there are sliderquant" in capsys.readouterr().err
