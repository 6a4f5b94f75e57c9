"""Metrics against closed forms."""

import math

import pytest
import torch

from fis_dit.method.metrics import (
    coverage,
    flicker,
    frechet_distance,
    motion_error,
    psnr,
    relative_l2,
    slowest_quarter,
)


def clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_of_a_constant_offset_is_its_closed_form() -> None:
    dense = clip(2, 1, 5, 3, 3)
    assert psnr(dense + 0.1, dense, 1.0) == pytest.approx(20.0)
    assert psnr(dense + 0.1, dense, 2.0) == pytest.approx(20 + 20 * math.log10(2))
    assert psnr(dense, dense, 1.0) == math.inf


def test_relative_l2_scales_with_the_error() -> None:
    dense = clip(2, 1, 5, 3, 3)
    assert relative_l2(1.25 * dense, dense) == pytest.approx(0.25)


def test_the_motion_error_ignores_what_does_not_move() -> None:
    dense = clip(2, 1, 5, 3, 3)
    assert motion_error(dense + 7, dense) == pytest.approx(0)
    assert motion_error(dense * 1.5, dense) == pytest.approx(0.5)


def test_coverage_is_the_worst_over_the_best_frame() -> None:
    dense = torch.zeros(1, 1, 3, 2, 2)
    wrong = dense + torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1)
    assert coverage(wrong, dense) == pytest.approx(9)


def test_flicker_is_zero_for_steady_motion_and_grows_with_noise() -> None:
    steady = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 2, 2)
    noisy = clip(1, 1, 6, 2, 2)
    assert flicker(steady, noisy) == pytest.approx(0)
    assert flicker(2 * noisy, noisy) == pytest.approx(4)


def test_the_slowest_quarter_moves_least() -> None:
    speeds = torch.tensor([3.0, 0.5, 2.0, 0.1, 5.0, 4.0, 1.0, 6.0])
    ramp = speeds.view(-1, 1, 1, 1, 1) * torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert slowest_quarter(ramp).tolist() == [3, 1]


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # Samples with exactly these moments: whitened noise, then scaled and moved.
    raw = clip(400, 3)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T)).T)
    one = white * torch.tensor([1.0, 2.0, 3.0]) + 1
    other = white * torch.tensor([2.0, 2.0, 1.0])
    # |mean|^2 = 3, and (1-2)^2 + (2-2)^2 + (3-1)^2 for commuting covariances.
    assert frechet_distance(one, other) == pytest.approx(3 + 5, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
