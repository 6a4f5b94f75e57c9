"""What FIS is compared with: costs, side effects, and what the method rests on."""

import dataclasses

import pytest
import torch

from fis_dit.demo.arms import (
    Arm,
    make_cache_arms,
    make_dropped_step_arm,
    make_fis_arm,
    make_skipped_blocks_arm,
    measure_magnitude_ratios,
    run_arm,
)
from fis_dit.demo.data import CLIP_SETS, draw_noise
from fis_dit.demo.models import load_model, noise_levels
from fis_dit.method.metrics import relative_l2

SHAPES, *OTHERS = CLIP_SETS
each_data = pytest.mark.parametrize(
    "data", [SHAPES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)


@pytest.mark.slow
def test_every_rival_leaves_the_model_as_it_was() -> None:
    model = load_model("shapes", "student")
    noise, prompt = draw_noise("shapes", 2, seed=0)
    dense = run_arm(model, Arm("dense", "dense"), noise, prompt)
    rivals = [make_dropped_step_arm(2), make_skipped_blocks_arm([3, 4]), make_fis_arm("FIS")]
    caches = make_cache_arms(measure_magnitude_ratios(model, noise, prompt))
    rivals += list({arm.group: arm for arm in caches}.values())  # one of each kind
    for arm in rivals:
        run = run_arm(model, arm, noise, prompt)
        assert run.flops <= dense.flops
        again = run_arm(model, Arm("dense", "dense"), noise, prompt)
        assert torch.equal(again.clips, dense.clips), arm.name
        assert again.flops == dense.flops, arm.name


def test_rivals_cost_what_their_names_say() -> None:
    model = load_model("shapes", "student")
    noise, prompt = draw_noise("shapes", 4, seed=0)
    dense = run_arm(model, Arm("dense", "dense"), noise, prompt).flops

    def cost(arm: Arm) -> float:
        return run_arm(model, arm, noise, prompt).flops / dense

    assert cost(make_dropped_step_arm(1)) == pytest.approx(3 / 4)
    assert cost(make_skipped_blocks_arm([1, 2])) == pytest.approx(6 / 8, abs=0.01)
    assert cost(make_fis_arm("n=2")) == pytest.approx(0.625, abs=0.02)
    assert cost(make_fis_arm("n=2", dense_steps=(-1,))) == pytest.approx(
        (3 * 0.625 + 1) / 4, abs=0.02
    )
    taylor = next(a for a in make_cache_arms([1] * 4) if a.name == "TaylorSeer order 1, every 2")
    assert cost(taylor) < 0.8  # without identifiers it would hook nothing and cost 1


def errors(data: str, arms: list[Arm], seeds=(1, 2, 3)) -> dict[str, list[float]]:
    """Relative error of the first step's velocity: one value per seed."""
    model, found = load_model(data, "student"), {}
    first = noise_levels(4)[:2]
    for seed in seeds:
        noise, prompt = draw_noise(data, 12, seed)
        dense = run_arm(model, Arm("dense", "dense", levels=first), noise, prompt)
        for arm in arms:
            made = run_arm(model, dataclasses.replace(arm, levels=first), noise, prompt)
            found.setdefault(arm.name, []).append(relative_l2(made.velocity, dense.velocity))
    return found


@each_data
def test_what_the_method_rests_on_holds_for_every_seed(data: str) -> None:
    same = {"equalize": True}
    arms = [
        make_fis_arm("residual"),
        make_fis_arm("hold", lift="hold"),
        make_fis_arm("carry", lift="carry"),
        make_fis_arm("state", lift="state"),
        make_fis_arm("interleaved", **same),
        make_fis_arm("static", pattern="static", **same),
        make_fis_arm("n=3", stride=3),
        make_fis_arm("n=4", stride=4),
        make_fis_arm("no dense blocks", dense_head=0, dense_tail=0),
        make_fis_arm("full keys", kv="full"),
    ]
    found = errors(data, arms)
    order = [
        ("residual", "hold"),
        ("hold", "carry"),
        ("carry", "state"),
        ("interleaved", "static"),
        ("residual", "n=3"),
        # Four anchors or three of thirteen: on digits it makes no difference any more.
        *([("n=3", "n=4")] if data == "shapes" else []),
        ("residual", "no dense blocks"),
        ("full keys", "residual"),
    ]
    for better, worse in order:
        pairs = zip(found[better], found[worse], strict=True)
        assert all(one < other for one, other in pairs), (better, worse, found)
