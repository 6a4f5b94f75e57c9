"""Orthogonal matrices and where they go, in float64."""

import math

import pytest
import torch

from sliderquant.method.rotation import hadamard, random_rotation


# 12, 20, 24, 44, 48, 60: Paley's first construction; 28, 36, 76: the second; 40, 768: doubled.
@pytest.mark.parametrize(
    "size", [1, 2, 4, 8, 64, 12, 20, 24, 28, 36, 40, 44, 48, 60, 76, 768, 1536]
)
def test_hadamard_matrices_have_signs_only_and_orthogonal_rows(size) -> None:
    made = hadamard(size)
    assert made is not None
    assert set(made.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(made @ made.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 14, 92])
def test_sizes_without_a_construction_get_a_random_rotation(size) -> None:
    assert hadamard(size) is None
    turned = random_rotation(size, torch.Generator().manual_seed(0))
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(turned @ turned.T, eye, rtol=0, atol=1e-13)
    assert turned.dtype == torch.float64


@pytest.mark.parametrize("size", [32, 96])
def test_rotation_spreads_one_channel_evenly_over_all(size) -> None:
    turned = random_rotation(size, torch.Generator().manual_seed(0))
    spread = torch.nn.functional.one_hot(torch.tensor(5), size).double() @ turned
    torch.testing.assert_close(spread.abs(), torch.full((size,), 1 / math.sqrt(size)).double())


def test_rotations_follow_the_seed() -> None:
    first, again, other = (random_rotation(32, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
