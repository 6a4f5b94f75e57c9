"""What each hot path may cost: ``budgets.json``, and the comparison with a new count."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.hot_paths import BUDGETS, HotPath, count

TOLERANCE = 0.10  # of the committed figure
_FIGURES = ("launches", "read", "written", "peak")


def each(paths: Sequence[HotPath], slow: Sequence[str] = ()) -> list[Any]:
    """Parameters of a test of every path; those whose name begins so are left to ``-m slow``.

    Slow are paths that another one contains, at a second setting or as a part.
    """
    return [
        pytest.param(
            path,
            id=path.name,
            marks=[pytest.mark.slow] if path.name.startswith(tuple(slow)) else [],
        )
        for path in paths
    ]


def budgets() -> dict[str, Any]:
    """Committed figures, by module and name of the path."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def assert_within_budget(module: str, path: HotPath) -> dict[str, Any]:
    """Count a path and compare it with its budget.

    Launches, bytes and peak memory may differ by a tenth; waits and copies, line by line, not at all.

    Returns:
        The new figures.
    """
    renew = f"if the change is meant, run python -m tests.cuda.renew {module}"
    committed = budgets().get(module, {}).get(path.name)
    assert committed, f"{path.name} has no budget; {renew}"
    cost = count(path)
    for name in _FIGURES:
        change = cost[name] / max(committed[name], 1) - 1
        assert abs(change) <= TOLERANCE, (
            f"{path.name}: {name} is {cost[name]:,}, {change:+.0%} of its budget; {renew}"
        )
    for name in ("waits", "copies", "fake", "scaled"):
        assert cost[name] == committed[name], f"{path.name}: {name} changed; {renew}"
    assert set(cost["flops"]) == set(committed["flops"]), f"{path.name}: types changed; {renew}"
    return cost


def write(figures: dict[str, Any], file: Path = BUDGETS) -> None:
    """Write all budgets, so that a change of cost shows in review."""
    file.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
