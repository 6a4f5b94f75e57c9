"""What each hot path may cost: ``budgets.json``, and the comparison with a new count."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.hot_paths import BUDGETS, HotPath, count

TOLERANCE = 0.10  # of the committed figure
_FIGURES = ("launches", "read", "written", "peak", "device_ms", "step_ms")


def each(paths: Sequence[HotPath], slow: Sequence[str] = ()) -> list[Any]:
    """Parameters of a test of every path; those whose name begins so are left to ``-m slow``.

    Slow are paths that another one contains, at a second setting or as a part, and the longest of those
    that are counted on a tiny model too.
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

    Launches, bytes, FLOPs, peak memory and time may differ by a tenth; waits and copies, line by line,
    not at all.

    Returns:
        The new figures.
    """
    renew = f"if the change is meant, run python -m tests.cuda.renew {module}"
    committed = budgets().get(module, {}).get(path.name)
    assert committed, f"{path.name} has no budget; {renew}"
    cost = count(path)
    changes = differences(cost, committed)
    assert not changes, "\n  ".join([f"{path.name} costs something else:", *changes, renew])
    return cost


def differences(cost: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """A line for each figure that is outside of its budget."""
    changes = []
    for name in _FIGURES:
        changes += _changed(name, cost[name], committed[name], TOLERANCE)
    for name, tolerance in (("flops", TOLERANCE), ("waits", 0), ("copies", 0)):
        for row in sorted({*cost[name], *committed[name]}):
            old, new = committed[name].get(row, 0), cost[name].get(row, 0)
            changes += _changed(f"{name} {row}", new, old, tolerance)
    for name in ("fake", "scaled"):
        if cost[name] != committed[name]:
            changes.append(f"{name}: {committed[name]} -> {cost[name]}")
    return changes


def _changed(name: str, new: float, old: float, tolerance: float) -> list[str]:
    if abs(new - old) <= tolerance * old:
        return []
    by = f" ({new / old - 1:+.0%})" if old else ""
    return [f"{name}: {old:,} -> {new:,}{by}"]


def write(figures: dict[str, Any], file: Path = BUDGETS) -> None:
    """Replace all budgets in one step, so that a change of cost shows in review."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(figures, indent=1) + "\n")
    new.replace(file)
