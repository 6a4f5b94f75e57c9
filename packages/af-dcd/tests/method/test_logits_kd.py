"""Logits distillation against sums written out by hand."""

import math

import pytest
import torch

from af_dcd import (
    logits_kd_loss,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logits_kd_is_the_kl_divergence_from_the_teacher_per_pixel() -> None:
    zs, zt, t = noise(2, 4, 3, 2), noise(2, 4, 3, 2, seed=1), 2.5
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(2):
                s, p = ([math.exp(v / t) for v in z[b, :, y, x].tolist()] for z in (zs, zt))
                total += sum(
                    u / sum(p) * math.log((u / sum(p)) / (v / sum(s)))
                    for u, v in zip(p, s, strict=True)
                )
    assert logits_kd_loss(zs, zt, t).item() == pytest.approx(t * t * total / 12)


def test_logits_kd_leaves_ignored_pixels_out_and_survives_when_all_are() -> None:
    zs, zt = noise(1, 4, 2, 2), noise(1, 4, 2, 2, seed=1)
    ignore = torch.tensor([[[True, False], [False, False]]])
    apart = [logits_kd_loss(zs[:, :, y, x, None, None], zt[:, :, y, x, None, None]) for y, x in
             ((0, 1), (1, 0), (1, 1))]  # fmt: skip
    value = logits_kd_loss(zs, zt, ignore=ignore)
    assert value.item() == pytest.approx(torch.stack(apart).mean().item())
    assert logits_kd_loss(zs, zt, ignore=torch.ones_like(ignore)).item() == 0
