"""What a path counts when a part of it stands for the whole."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.hot_paths import HotPath, Kit, Step, count, measure


def layers(number: int) -> Callable[[Kit, bool], Step]:
    """A table that is looked up once, a reading that waits once, and ``number`` products."""

    def build(kit: Kit, tiny: bool) -> Step:
        table, x = kit.randn(1000, 64), kit.randn(8, 64)
        rows, weights = kit.randint(1000, 8), [kit.randn(64, 64) for _ in range(number)]

        def step() -> torch.Tensor:
            out = x + table[rows]
            out.sum().cpu()
            for weight in weights:
                out = out @ weight
            return out

        return step

    return build


def test_what_happens_once_is_not_multiplied() -> None:
    whole = count(HotPath("40 layers", layers(40)))
    part = count(HotPath("2 of 40", layers(2), scaled=20, once=layers(0)))
    differing = {"scaled", "peak"}  # the peak is that of the part
    assert {k: v for k, v in part.items() if k not in differing} == {
        k: v for k, v in whole.items() if k not in differing
    }
    assert sum(part["waits"].values()) == 1
    assert part["peak"] < whole["peak"]


def test_without_it_all_is_multiplied() -> None:
    part = count(HotPath("2 of 40", layers(2), scaled=20))
    assert sum(part["waits"].values()) == 20


def test_the_time_of_what_happens_once_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([7.0, 3.0])  # milliseconds of two layers and of none
    monkeypatch.setattr("benchmarks.hot_paths._clock_ms", lambda step: next(times))
    path = HotPath("2 of 40", layers(2), scaled=20, once=layers(0))
    figures = measure(path, torch.device("cpu"), tiny=True, compiled=False, seconds=0)
    assert figures["ms"] == 3 + 20 * (7 - 3)
