"""``bench``: samplers beside one another, on a user's own pipeline."""

import json

import pytest
from morse_commands import run

from morse_diffusion.adapters.timing import StepTimes
from morse_diffusion.commands import bench
from morse_diffusion.config import BenchConfig


@pytest.mark.slow
def test_bench_measures_every_method_or_says_that_the_dot_is_too_slow(
    pixels, trained, photos, tmp_path, capsys, monkeypatch
) -> None:
    words = ["bench", pixels, trained, photos, "--budgets", 3, 5, "--samples", 48, "--json"]
    slow = StepTimes(dash=1.2, dot=1.0, cached=None)
    monkeypatch.setattr(bench, "measure_times", lambda *a, **k: slow)
    error = run(capsys, *words, "--out", tmp_path / "slow", code=2)
    assert "measured N = 1.20: the Dot is too slow" in error
    assert not (tmp_path / "slow").exists()
    fast = StepTimes(dash=4.0, dot=1.0, cached=None)
    monkeypatch.setattr(bench, "measure_times", lambda *a, **k: fast)
    told = json.loads(run(capsys, *words, "--early", 2, "--out", tmp_path / "fast"))
    names = {row["name"] for row in told["rows"]}
    assert names == {
        "DDIM", "DPM-Solver++ 2M", "UniPC", "extrapolation on DDIM", "Morse on DDIM", "Morse on 2M",
    }  # fmt: skip
    assert len(told["rows"]) == 12
    assert (tmp_path / "fast" / "run" / "quality.png").is_file()


def test_bench_crowds_the_full_steps_of_morse_alone() -> None:
    methods = bench.chosen_methods(BenchConfig(pipe="p", dot="d", data="i", early=1.5))
    assert {method.name: method.early for method in methods if method.early > 1} == {
        "Morse on DDIM": 1.5, "Morse on 2M": 1.5,
    }  # fmt: skip
