"""The three terms on one pair of maps, and one pair of class scores."""

import pytest
import torch

from af_dcd import (
    AfDCDLoss,
    DistillConfig,
    omni_contrastive_loss,
)
from af_dcd.method.distillation import kd_term, resize_to_match
from af_dcd.method.mimicking import feature_loss
from effml_common.errors import InputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_branch_returns_both_weighted_terms_and_contrasts_the_generated_map() -> None:
    config = DistillConfig(lambda_fd=0.5, lambda_ctr=0.25, mask="center", pool=1, groups=4)
    branch = AfDCDLoss(3, 8, config).double()
    fs, ft = noise(2, 3, 4, 4).requires_grad_(), noise(2, 8, 4, 4, seed=1).requires_grad_()
    terms = branch(fs, ft)
    generated = branch.generation(fs)
    assert terms["loss_fd"].item() == pytest.approx(0.5 * feature_loss(generated, ft).item())
    contrast = omni_contrastive_loss(generated, ft, pool=1, groups=4).item()
    assert terms["loss_ctr"].item() == pytest.approx(0.25 * contrast)
    terms["loss_ctr"].backward()
    assert ft.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
    assert fs.grad is not None
    assert fs.grad.abs().sum() > 0


def test_spatial_and_channel_contrast_are_cases_of_the_omni_form() -> None:
    base = {"groups": 4, "patch": 2, "pool": 1}
    s, t = noise(1, 8, 4, 4), noise(1, 8, 4, 4, seed=1)
    spatial = DistillConfig(contrast="spatial", **base).contrast_settings()
    channel = DistillConfig(contrast="channel", **base).contrast_settings()
    whole = {"pool": 1, "tau": 0.07}
    assert omni_contrastive_loss(s, t, **spatial) == omni_contrastive_loss(
        s, t, groups=1, patch=2, negatives="all", **whole
    )
    assert omni_contrastive_loss(s, t, **channel) == omni_contrastive_loss(
        s, t, groups=4, patch=1, **whole
    )


def test_the_contrast_falls_when_it_is_followed() -> None:
    t = noise(1, 8, 4, 4).relu()
    s = noise(1, 8, 4, 4, seed=1).requires_grad_()
    optimizer = torch.optim.SGD([s], lr=1.0)
    values = []
    for _ in range(30):
        loss = omni_contrastive_loss(s, t, groups=4, patch=2, pool=1, tau=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]


def test_maps_of_two_sizes_need_a_side_to_resize() -> None:
    a, b = noise(1, 2, 4, 4), noise(1, 2, 8, 8)
    assert resize_to_match(a, b, "student")[0].shape == b.shape
    assert resize_to_match(a, b, "teacher")[1].shape == a.shape
    with pytest.raises(InputError, match=r"4x4 and the teacher's 8x8; .*resize"):
        resize_to_match(a, b, "none")


def test_class_counts_that_differ_are_refused_unless_kd_is_off() -> None:
    a, b = noise(1, 3, 2, 2), noise(1, 4, 2, 2)
    with pytest.raises(InputError, match=r"3 classes and the teacher 4; .*lambda_kd=0"):
        kd_term(a, b, DistillConfig())
    assert kd_term(a, b, DistillConfig(lambda_kd=0)) == {}
