"""Scores of label maps, against counts by hand."""

import math

import pytest
import torch

from af_dcd.method.metrics import Scores, outline


def test_iou_and_its_mean_are_counted_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    guess = torch.tensor([[[0, 1, 1], [1, 0, 0]]])
    scores = Scores(3)
    scores.add(guess, truth)
    assert scores.iou()[:2].tolist() == pytest.approx([1 / 3, 2 / 4])
    assert math.isnan(scores.iou()[2])
    assert scores.mean_iou() == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


def test_the_outline_of_a_square_is_its_rim() -> None:
    mask = torch.zeros(1, 7, 7)
    mask[:, 2:6, 1:5] = 1
    expected = mask.clone()
    expected[:, 3:5, 2:4] = 0
    assert torch.equal(outline(mask), expected)
    assert outline(torch.ones(1, 5, 5)).sum() == 0  # the border of the image is no outline


def test_boundary_f_is_full_for_a_shift_within_the_tolerance_and_none_beyond() -> None:
    truth = torch.zeros(1, 24, 24).long()
    truth[:, 8:16, 8:16] = 1

    def f(shift: int) -> float:
        scores = Scores(2)
        scores.add(truth.roll(shift, 2), truth)
        return scores.boundary_f()

    assert f(0) == f(1) == 100
    assert f(4) < 75
