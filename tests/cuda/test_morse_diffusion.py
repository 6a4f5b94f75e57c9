"""morse-diffusion's calls, sampling steps and training step on a fake device: place and cost."""

from dataclasses import replace

import pytest
from benchmarks.hot_paths import HotPath, count
from benchmarks.morse_diffusion.cuda import PATHS

from tests.cuda.budgets import assert_within_budget, budgets, each

SLOW = (
    "Dash call, SDXL",  # a step of sample contains the call
    "Dot call, SDXL",
    "sample, Dash step",  # the Dot step runs its blocks
    "sample, Dot step, SDXL",
    "train-dot step",  # of two parts
    "train-dot, the Dot's update",  # part of the step that is counted tiny
)
BY_NAME = {path.name: path for path in PATHS}


@pytest.mark.parametrize("path", each(PATHS, slow=SLOW))
def test_a_path_costs_what_was_committed(path: HotPath) -> None:
    assert_within_budget("morse_diffusion", path)


@pytest.mark.parametrize("kind", ["Dash", "Dot"])
def test_a_step_of_sample_waits_for_its_time_its_values_and_the_clock(kind: str) -> None:
    cost = count(BY_NAME[f"sample, {kind} step, SD 1.5"], tiny=True)
    waits = {"hook.py:_locate": 1, "hook.py:_check_finite": 1, "device.py:synchronize": 2}
    # The guidance scale is a number of the host's.
    copied = {"base.py:guidance_features": 1} if kind == "Dot" else {}
    assert cost["waits"] == waits | copied
    assert cost["copies"] == {f"to device {line}": n for line, n in copied.items()}


@pytest.mark.slow
def test_a_training_step_stays_on_its_device() -> None:
    step = BY_NAME["train-dot step, SD 1.5, batch 8"]
    cost = count(replace(step, fake="gpu:0"), tiny=True)
    assert not cost["copies"]
    assert cost["waits"] == {"stopping.py:check_finite": 2, "trainer.py:update_dot": 1}


def test_the_parts_of_a_training_step_are_its_budget() -> None:
    figures = budgets()["morse_diffusion"]
    whole = figures["train-dot step, SD 1.5, batch 8"]
    parts = [figures[n] for n in figures if n.startswith("train-dot,") and "step" not in n]
    for name in ("launches", "read", "written"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], rel=0.02)
    assert max(part["peak"] for part in parts) <= whole["peak"]
