"""The demo's data, models, rivals and report."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from effml_common.errors import InputError
from fis_dit import demo as demo_module
from fis_dit.config import DemoConfig
from fis_dit.demo import demo, make_noise
from fis_dit.demo_data import CLIP_SETS, FRAMES, MAX_SPEED, clips, text, to_pixels
from fis_dit.demo_model import (
    ASSETS,
    distil,
    euler,
    load,
    noise_levels,
    teacher_paths,
    train_teacher,
    velocity,
)
from fis_dit.metrics import relative_l2
from fis_dit.rivals import (
    Arm,
    cache_arms,
    dropped_step,
    fis,
    magnitude_ratios,
    run_arm,
    skipped_blocks,
)

each_data = pytest.mark.parametrize("data", CLIP_SETS)


@each_data
def test_clips_are_standardised_and_move_at_most_at_the_top_speed(data: str) -> None:
    values, labels, speeds = clips(data, 128, seed=0)
    size = CLIP_SETS[data].size
    assert values.shape == (128, 1, FRAMES, size, size)
    assert abs(values.mean()) < 0.15
    assert 0.8 < values.std() < 1.2
    assert labels.max() < CLIP_SETS[data].classes
    assert speeds.max() <= MAX_SPEED
    pixels = to_pixels(data, values)
    assert pixels.min() == 0
    assert pixels.max() <= 1
    assert torch.equal(clips(data, 128, seed=0)[0], values)


def test_a_shape_moves_by_its_speed_between_walls() -> None:
    values, _, speeds = clips("shapes", 64, seed=1)
    mass = to_pixels("shapes", values)[:, 0]
    grid = torch.arange(9.0)
    total = mass.sum((2, 3))
    centre = torch.stack(
        [(mass.sum(3) * grid).sum(2) / total, (mass.sum(2) * grid).sum(2) / total], -1
    )
    moved = centre.diff(dim=1).norm(dim=-1).median(dim=1).values
    torch.testing.assert_close(moved, speeds, atol=0.12, rtol=0.15)


def test_noise_levels_are_the_shifted_ones() -> None:
    assert noise_levels(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert noise_levels(2, shift=1.0) == pytest.approx([1, 0.5, 0])


def test_the_student_makes_shapes_that_the_classifier_recognises() -> None:
    data = "shapes"
    student, classifier = load(data, "student"), load(data, "classifier")
    noise, prompt = make_noise(data, 24, seed=3)
    made = run_arm(student, Arm("dense", "dense"), noise, prompt).clips
    with torch.no_grad():
        right = (classifier(made)[:, :-1].argmax(1) == prompt[:, 0].argmax(1)).float().mean()
    assert right > 0.9


def test_a_short_training_and_distillation_learn_something(monkeypatch) -> None:
    short = dataclasses.replace(CLIP_SETS["shapes"], teacher_steps=30, student_steps=8, paths=8)
    monkeypatch.setitem(CLIP_SETS, "shapes", short)
    teacher = train_teacher("shapes").eval()
    values, labels, _ = clips("shapes", 32, seed=9)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    level = torch.full((32,), 0.7)
    with torch.no_grad():
        found = velocity(teacher, 0.7 * noise + 0.3 * values, level, text("shapes", labels))
    assert (found - (noise - values)).square().mean() < (noise - values).square().mean()
    points, prompts = teacher_paths(teacher, "shapes", 2, seed=1)
    assert points.shape == (5, 2, 1, 13, 9, 9)
    # The path's last stretch is the teacher's own, in eight steps.
    fine = [0.5 * (1 - i / 8) for i in range(9)]
    with torch.no_grad():
        *_, (_, end) = euler(teacher, points[3], prompts, fine)
    torch.testing.assert_close(end, points[4], rtol=1e-4, atol=1e-5)
    assert isinstance(distil(teacher, "shapes"), type(teacher))


def test_missing_weights_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="shapes-student"):
        load("shapes", "student", tmp_path)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 5e6


def test_every_rival_leaves_the_model_as_it_was() -> None:
    model = load("shapes", "student")
    noise, prompt = make_noise("shapes", 2, seed=0)
    dense = run_arm(model, Arm("dense", "dense"), noise, prompt)
    rivals = [dropped_step(2), skipped_blocks([3, 4]), fis("FIS")]
    caches = cache_arms(magnitude_ratios(model, noise, prompt))
    rivals += list({arm.group: arm for arm in caches}.values())  # one of each kind
    for arm in rivals:
        run = run_arm(model, arm, noise, prompt)
        assert run.flops <= dense.flops
        again = run_arm(model, Arm("dense", "dense"), noise, prompt)
        assert torch.equal(again.clips, dense.clips), arm.name
        assert again.flops == dense.flops, arm.name


def test_rivals_cost_what_their_names_say() -> None:
    model = load("shapes", "student")
    noise, prompt = make_noise("shapes", 4, seed=0)
    dense = run_arm(model, Arm("dense", "dense"), noise, prompt).flops

    def cost(arm: Arm) -> float:
        return run_arm(model, arm, noise, prompt).flops / dense

    assert cost(dropped_step(1)) == pytest.approx(3 / 4)
    assert cost(skipped_blocks([1, 2])) == pytest.approx(6 / 8, abs=0.01)
    assert cost(fis("n=2")) == pytest.approx(0.625, abs=0.02)
    assert cost(fis("n=2", dense_steps=(-1,))) == pytest.approx((3 * 0.625 + 1) / 4, abs=0.02)
    taylor = next(a for a in cache_arms([1] * 4) if a.name == "TaylorSeer order 1, every 2")
    assert cost(taylor) < 0.8  # without identifiers it would hook nothing and cost 1


def test_the_demo_writes_table_claims_plot_and_animation(tmp_path, monkeypatch) -> None:
    few = demo_module.arms

    def arms(ratios):
        kept = ("dense", "FIS paper-like", "FIS static anchors", "FIS interleaved, same count")
        kept += ("3 steps", "skip blocks 2 6 7")
        return [arm for arm in few(ratios) if arm.name in kept]

    monkeypatch.setattr(demo_module, "arms", arms)
    report = demo(DemoConfig(clips=4, out=str(tmp_path)))
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["rows"][0]["name"] == "dense"
    assert {claim["holds"] for claim in told["claims"]} == {"not resolved"}  # one seed
    assert len(report.rows) == 6
    with Image.open(tmp_path / "run" / "clips.gif") as clip:
        assert clip.n_frames == FRAMES
    assert (tmp_path / "run" / "quality.png").stat().st_size > 1000
    assert "clips" in (tmp_path / "run" / "report.html").read_text()


def errors(data: str, arms: list[Arm], seeds=(1, 2, 3)) -> dict[str, list[float]]:
    """Relative error of the first step's velocity: one value per seed."""
    model, found = load(data, "student"), {}
    first = noise_levels(4)[:2]
    for seed in seeds:
        noise, prompt = make_noise(data, 12, seed)
        dense = run_arm(model, Arm("dense", "dense", levels=first), noise, prompt)
        for arm in arms:
            made = run_arm(model, dataclasses.replace(arm, levels=first), noise, prompt)
            found.setdefault(arm.name, []).append(relative_l2(made.velocity, dense.velocity))
    return found


@each_data
def test_what_the_method_rests_on_holds_for_every_seed(data: str) -> None:
    same = {"equalize": True}
    arms = [
        fis("residual"),
        fis("hold", lift="hold"),
        fis("carry", lift="carry"),
        fis("state", lift="state"),
        fis("interleaved", **same),
        fis("static", pattern="static", **same),
        fis("n=3", stride=3),
        fis("n=4", stride=4),
        fis("no dense blocks", dense_head=0, dense_tail=0),
        fis("full keys", kv="full"),
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
