import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morse_diffusion.errors import PlanError
from morse_diffusion.method.schedule import MorsePlan, make_plan, spread_indices


def test_the_paper_s_example_of_two_dash_and_four_dot_steps() -> None:
    assert MorsePlan.uniform(2, 4).pattern == "DddDdd"


@given(st.integers(1, 60), st.integers(0, 300))
def test_dash_steps_are_spread_evenly_and_begin_the_run(dash: int, dots: int) -> None:
    plan = MorsePlan.uniform(dash, dots)
    total = dash + dots
    assert plan.dash_indices == tuple(math.floor(j * total / dash) for j in range(dash))
    gaps = [b - a for a, b in zip(plan.dash_indices, (*plan.dash_indices[1:], total), strict=True)]
    assert plan.dash_indices[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_early_dash_steps_by_hand() -> None:
    # 7 (j / 4)^1.5 = 0.875, 2.47, 4.55; the first would fall on index 0, which is taken.
    assert spread_indices(4, 7, 1.5) == (0, 1, 2, 4)
    assert MorsePlan.spread(4, 3, early=1.5).pattern == "DDDdDdd"
    assert make_plan(5, 4.2, 1.5, early=1.5).pattern == "DDDdDdd"


@given(st.integers(1, 60), st.integers(0, 300), st.floats(1, 4))
def test_early_moves_every_dash_step_forward_and_keeps_their_number(dash, dots, early) -> None:
    even, moved = (spread_indices(dash, dash + dots, e) for e in (1.0, early))
    assert moved[0] == 0
    assert len(set(moved)) == dash
    assert all(a <= b for a, b in zip(moved, even, strict=True))


@pytest.mark.parametrize("early", [0.5, float("nan"), float("inf")])
def test_an_early_that_spreads_nothing_is_refused(early) -> None:
    with pytest.raises(PlanError, match="early is"):
        MorsePlan.spread(2, 3, early=early)


def test_a_budget_splits_into_n_minus_k_dash_and_n_times_k_dot_steps() -> None:
    # By hand, n = 10, N = 6, r = 2.5: k = 10 * 1.5 / 5 = 3, so 7 Dash and 18 Dot steps, 25 in all.
    plan = make_plan(10, 6, 2.5)
    assert (plan.dash_steps, plan.dot_steps) == (7, 18)
    assert plan.lsd == pytest.approx(10)
    assert plan.share == pytest.approx(0.3)
    assert plan.expansion == pytest.approx(2.5)


@given(st.floats(2, 100), st.floats(1.6, 20))
def test_a_plan_never_costs_more_than_its_budget(budget: float, ratio: float) -> None:
    plan = make_plan(budget, ratio)
    # Rounding the Dash steps up may cost half a step, unless the Dot steps give it back.
    assert plan.lsd <= max(budget, plan.dash_steps) + 1e-6
    assert plan.dash_steps <= budget + 0.5
    assert plan.share <= 0.7 + 1 / budget


def test_a_very_fast_dot_still_gets_its_steps() -> None:
    # N = 100, r = 2.5, 6 LSD: k = 0.09 would round to no Dot step; 15 steps in all are wanted.
    plan = make_plan(6, 100)
    assert (plan.dash_steps, plan.dot_steps) == (5, 10)


def test_r_of_one_is_plain_sampling() -> None:
    assert make_plan(10, 6, 1).pattern == "D" * 10


def test_a_time_budget_counts_the_scheduler_in_both_kinds_of_step() -> None:
    # (9 + 1) ms a Dash step, (1 + 1) a Dot step: N = 5, and 100 ms are 10 LSD.
    plan = MorsePlan.from_latency(100, {"t_dash": 9, "t_dot": 1, "t_sched": 1})
    assert plan == make_plan(10, 5)


def test_a_plan_survives_json_and_can_be_a_dictionary_key() -> None:
    for plan in (make_plan(10, 6), MorsePlan.uniform(3, 5), MorsePlan.spread(3, 5, early=2)):
        again = MorsePlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert {plan: 1}[again] == 1


def test_a_shorter_run_keeps_the_share_of_dash_steps() -> None:
    plan = MorsePlan.uniform(7, 18).rescaled(10)
    assert (plan.n_total, plan.dash_steps) == (10, 3)
    assert plan.rescaled(1).pattern == "D"
    early = MorsePlan.spread(7, 18, early=1.5).rescaled(10)
    assert early.dash_indices == spread_indices(3, 10, 1.5)


@pytest.mark.parametrize(
    ("total", "indices", "said"),
    [
        (5, (), "without a Dash step"),
        (5, (1, 2), "first step must be a Dash"),
        (5, (0, 3, 2), "unsorted"),
        (5, (0, 2, 2), "repeated"),
        (5, (0, 5), "outside of 5 steps"),
    ],
)
def test_a_plan_that_cannot_be_sampled_is_refused(total, indices, said) -> None:
    with pytest.raises(PlanError, match=said):
        MorsePlan(total, indices)


@pytest.mark.parametrize("ratio", [1.0, 0.5, float("nan"), -3.0])
def test_a_dot_that_is_no_faster_is_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match="N is"):
        make_plan(10, ratio)
    with pytest.raises(PlanError, match="N is"):
        MorsePlan(4, (0,), ratio)


def test_a_budget_that_is_too_small_is_refused_with_the_minimum() -> None:
    with pytest.raises(PlanError, match="give at least 1 LSD"):
        make_plan(0.5, 6)
    with pytest.raises(PlanError, match=r"give at least 1\.17 LSD, or r=1"):
        make_plan(1.1, 6)
    with pytest.raises(PlanError, match="at least 1 Dash"):
        MorsePlan.uniform(0, 4)
    with pytest.raises(PlanError, match="lacks 't_dot'"):
        MorsePlan.from_latency(100, {"t_dash": 9})


def test_too_large_a_share_of_dot_steps_warns(capsys) -> None:
    MorsePlan.uniform(2, 48, 6)
    assert "80% of the budget goes to Dot steps" in capsys.readouterr().err
    MorsePlan.uniform(7, 18, 6)
    assert capsys.readouterr().err == ""
