"""The demo's models, and how they were trained."""

import dataclasses

import pytest
import torch

from effml_common.errors import InputError
from fis_dit.demo.arms import Arm, run_arm
from fis_dit.demo.data import CLIP_SETS, draw_clips, draw_noise, encode_labels
from fis_dit.demo.models import (
    ASSETS,
    denoise,
    distil,
    follow_teacher,
    load_model,
    noise_levels,
    predict_velocity,
    train_teacher,
)


def test_noise_levels_are_the_shifted_ones() -> None:
    assert noise_levels(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert noise_levels(2, shift=1.0) == pytest.approx([1, 0.5, 0])


def test_the_student_makes_shapes_that_the_classifier_recognises() -> None:
    data = "shapes"
    student, classifier = load_model(data, "student"), load_model(data, "classifier")
    noise, prompt = draw_noise(data, 24, seed=3)
    made = run_arm(student, Arm("dense", "dense"), noise, prompt).clips
    with torch.no_grad():
        right = (classifier(made)[:, :-1].argmax(1) == prompt[:, 0].argmax(1)).float().mean()
    assert right > 0.9


@pytest.mark.slow
def test_a_short_training_and_distillation_learn_something(monkeypatch) -> None:
    short = dataclasses.replace(CLIP_SETS["shapes"], teacher_steps=30, student_steps=8, paths=8)
    monkeypatch.setitem(CLIP_SETS, "shapes", short)
    teacher = train_teacher("shapes").eval()
    values, labels, _ = draw_clips("shapes", 32, seed=9)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    level = torch.full((32,), 0.7)
    with torch.no_grad():
        found = predict_velocity(teacher, 0.7 * noise + 0.3 * values, level, encode_labels(labels))
    assert (found - (noise - values)).square().mean() < (noise - values).square().mean()
    points, prompts = follow_teacher(teacher, "shapes", 2, seed=1)
    assert points.shape == (5, 2, 1, 13, 9, 9)
    # The path's last stretch is the teacher's own, in eight steps.
    fine = [0.5 * (1 - i / 8) for i in range(9)]
    with torch.no_grad():
        *_, (_, end) = denoise(teacher, points[3], prompts, fine)
    torch.testing.assert_close(end, points[4], rtol=1e-4, atol=1e-5)
    assert isinstance(distil(teacher, "shapes"), type(teacher))


def test_missing_weights_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="shapes-student"):
        load_model("shapes", "student", tmp_path)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 5e6
