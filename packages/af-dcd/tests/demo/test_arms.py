"""What Af-DCD is compared with."""

import pytest
import torch

from af_dcd import (
    cwd_loss,
    feature_mse_loss,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cwd_compares_where_each_channel_is_active() -> None:
    s, t = noise(2, 3, 2, 2), noise(2, 3, 2, 2, seed=1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            p, q = ((x[b, c].flatten() / 4).softmax(0) for x in (t, s))
            total += float((p * (p / q).log()).sum())
    assert cwd_loss(s, t).item() == pytest.approx(16 * total / 6)
    assert cwd_loss(t + 3, t).item() == pytest.approx(0, abs=1e-12)


def test_feature_mse_is_a_plain_mean() -> None:
    assert feature_mse_loss(noise(1, 2, 2, 2) * 0, noise(1, 2, 2, 2) * 0 + 3).item() == 9
