"""What a path counts when a part of it stands for the whole."""

import json
from collections.abc import Callable

import pytest
import torch
from benchmarks.hot_path_timing import main, measure
from benchmarks.hot_paths import HotPath, Kit, Step, count


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
    monkeypatch.setattr("benchmarks.hot_path_timing._clock_ms", lambda step: next(times))
    path = HotPath("2 of 40", layers(2), scaled=20, once=layers(0))
    figures = measure(path, torch.device("cpu"), tiny=True, compiled=False, seconds=0)
    assert figures["ms"] == 3 + 20 * (7 - 3)


def test_a_path_that_forgets_the_kit_is_refused() -> None:
    def build(kit: Kit, tiny: bool) -> Step:
        x = torch.zeros(3)
        return lambda: x + 1

    with pytest.raises(ValueError, match=r"launched nothing on cuda:0; build with the kit"):
        count(HotPath("forgetful", build))


def test_a_part_that_costs_less_than_what_happens_once_is_refused() -> None:
    with pytest.raises(ValueError, match="costs more than the part"):
        count(HotPath("wrong way round", layers(0), scaled=20, once=layers(2)))


def test_what_a_wait_returns_starts_anew_with_each_count() -> None:
    class Rows:
        """More rows each time."""

        def __init__(self) -> None:
            self.rows = 0

        def __call__(self, func, args):
            self.rows += 1
            return args[0].new_empty((self.rows, 1), dtype=torch.long)

    def build(kit: Kit, tiny: bool) -> Step:
        x = kit.randn(8)
        return lambda: x.nonzero()

    path = HotPath("rows", build, allow={"test_hot_paths.py:<lambda>": Rows()})
    assert count(path) == count(path)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--only", "nothing"], "no path holds 'nothing'; there are:\n  2 layers"),
        (["--device", "meta"], "--device meta: use cuda, cuda:N or cpu"),
        (["--device", "cuda:99"], "CUDA devices here; --predict counts without one"),
        (["--device", "cpu", "--seconds", "nan"], "--seconds nan: must be more than 0"),
        (["--device", "cpu", "--out", __file__], "cannot write to"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, line, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("nowhere", [HotPath("2 layers", layers(2))], argv)
    assert line in capsys.readouterr().err


def test_a_path_that_fails_costs_none_of_the_others_and_fails_the_run(tmp_path, capsys) -> None:
    def broken(kit: Kit, tiny: bool) -> Step:
        raise RuntimeError("no such layer")

    paths = [HotPath("broken", broken), HotPath("2 layers", layers(2))]
    with pytest.raises(SystemExit, match="1"):
        main(
            "nowhere",
            paths,
            ["--device", "cpu", "--tiny", "--seconds", "60", "--out", str(tmp_path)],
        )
    table = capsys.readouterr().out
    assert "RuntimeError: no such layer" in table
    assert "compiled ms" not in table  # no column is empty
    rows = json.loads((tmp_path / "nowhere-cuda.json").read_text())["paths"]
    assert rows["broken"]["eager"] == {"error": "RuntimeError: no such layer"}
    assert rows["2 layers"]["eager"]["ms"] > 0
