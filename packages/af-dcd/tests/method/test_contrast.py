"""The contrast against sums written out term by term, and the chunked form against the naive one."""

import math

import pytest
import torch
from torch import Tensor

import af_dcd.method.contrast
from af_dcd import omni_contrastive_loss
from effml_common.errors import InputError


def maps(b=1, c=8, h=4, w=4, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn((b, c, h, w), generator=g, dtype=dtype) for _ in range(2))
    return s.requires_grad_(), t.relu()


def distance(a: Tensor, b: Tensor, p: int) -> float:
    values = [abs(float(x) - float(y)) for x, y in zip(a, b, strict=True)]
    return sum(values) if p == 1 else math.sqrt(sum(v * v for v in values))


def by_hand(s, t, *, groups, patch, tau, p, negatives) -> float:
    """Every term of the definition, one scalar at a time; no pooling."""
    b, c, h, w = s.shape
    d, total = c // groups, 0.0
    ph, pw = patch

    def vector(x, image, y, z, m):
        return x[image, m * d : (m + 1) * d, y, z]

    for image in range(b):
        for y in range(h):
            for z in range(w):
                top, left = y // ph * ph, z // pw * pw
                for m in range(groups):
                    own = vector(s, image, y, z, m)
                    positive = distance(own, vector(t, image, y, z, m), p) / tau
                    others = [positive]
                    for y2 in range(top, top + ph):
                        for z2 in range(left, left + pw):
                            for m2 in range(groups):
                                same = (y2, z2, m2) == (y, z, m)
                                if same or (negatives == "cross_group" and m2 == m):
                                    continue
                                others.append(distance(own, vector(t, image, y2, z2, m2), p) / tau)
                    total += positive + math.log(sum(math.exp(-o) for o in others))
    return total / (b * h * w)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("negatives", ["cross_group", "all"])
@pytest.mark.parametrize(("groups", "patch"), [(4, (2, 2)), (2, (2, 4)), (3, (1, 1)), (4, (3, 1))])
def test_the_contrast_is_the_papers_sum_term_by_term(groups, patch, negatives, p) -> None:
    s, t = maps(b=2, c=12, h=6 if patch[0] == 3 else 4, w=4)
    settings = {"groups": groups, "patch": patch, "tau": 0.9, "p": p, "negatives": negatives}
    expected = by_hand(s.detach(), t, **settings)
    for impl in ("naive", "chunked"):
        value = omni_contrastive_loss(s, t, pool=1, impl=impl, **settings)
        assert value.item() == pytest.approx(expected, rel=1e-10)


def test_spatial_contrast_compares_whole_vectors_of_other_positions() -> None:
    s, t = maps(c=6, h=2, w=3)
    value = omni_contrastive_loss(s, t, groups=1, patch=None, pool=1, tau=2.0, negatives="all")
    settings = {"groups": 1, "patch": (2, 3), "tau": 2.0, "p": 1, "negatives": "all"}
    assert value.item() == pytest.approx(by_hand(s.detach(), t, **settings), rel=1e-10)


def test_features_are_max_pooled_before_the_patches_are_cut() -> None:
    s, t = maps(c=4, h=4, w=4)
    pooled = [x.detach().reshape(1, 4, 2, 2, 2, 2).amax(dim=(3, 5)) for x in (s, t)]
    settings = {"groups": 2, "patch": (2, 2), "tau": 0.5, "p": 1, "negatives": "cross_group"}
    value = omni_contrastive_loss(s, t, pool=2, **settings)
    assert value.item() == pytest.approx(by_hand(*pooled, **settings), rel=1e-10)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("negatives", ["cross_group", "all"])
@pytest.mark.parametrize(
    ("shape", "groups", "patch"),
    [((1, 6, 5, 7), 3, None), ((2, 15, 3, 9), 5, (3, 3)), ((3, 7, 4, 2), 7, (2, 1))],
)
@pytest.mark.parametrize("budget", [1, 3000])
def test_chunked_equals_naive_in_value_and_gradient(
    shape, groups, patch, negatives, p, budget, monkeypatch
) -> None:
    monkeypatch.setattr(af_dcd.method.contrast, "BLOCK_BYTES", budget)
    s, t = maps(*shape, seed=budget)
    settings = {"groups": groups, "patch": patch, "pool": 1, "p": p, "negatives": negatives}
    results = []
    for impl in ("naive", "chunked"):
        s.grad = None
        value = omni_contrastive_loss(s, t, tau=0.3, impl=impl, **settings)
        (3 * value).backward()
        results.append((value.item(), s.grad))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_the_gradient_is_finite_where_student_and_teacher_agree(p) -> None:
    _, t = maps(c=8)
    s = t.clone().requires_grad_()
    omni_contrastive_loss(s, t, groups=4, patch=2, pool=1, p=p).backward()
    assert torch.isfinite(s.grad).all()


def test_the_gradient_agrees_with_finite_differences() -> None:
    s, t = maps(c=4, h=2, w=2)
    assert torch.autograd.gradcheck(
        lambda x: omni_contrastive_loss(x, t, groups=2, patch=2, pool=1, tau=1.0), (s,)
    )


def test_the_teacher_gets_no_gradient() -> None:
    s, t = maps()
    t.requires_grad_()
    for impl in ("naive", "chunked"):
        omni_contrastive_loss(s, t, groups=4, patch=2, pool=1, impl=impl).backward()
    assert t.grad is None
    assert s.grad is not None


def test_half_precision_features_give_a_float32_loss_and_a_half_gradient() -> None:
    s, t = maps(dtype=torch.float32)
    low = s.detach().bfloat16().requires_grad_()
    value = omni_contrastive_loss(low, t.bfloat16(), groups=4, patch=2, pool=1)
    value.backward()
    assert value.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_crop_to_fit_drops_the_right_and_bottom_rest() -> None:
    s, t = maps(c=4, h=5, w=7)
    settings = {"groups": 2, "patch": 2, "pool": 1}
    cropped = omni_contrastive_loss(s[:, :, :4, :6], t[:, :, :4, :6], **settings)
    value = omni_contrastive_loss(s, t, crop_to_fit=True, **settings)
    assert value.item() == cropped.item()


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((1, 10, 8, 8), {"groups": 4, "pool": 1}, r"10 channels .* \[1, 2, 5, 10\]"),
        ((1, 8, 20, 24), {"groups": 4, "pool": 4}, "gives a 16x32 feature map"),
        (
            (1, 8, 12, 12),
            {"groups": 4, "pool": 4},
            r"smaller than one 4x4 patch; use a smaller pool \(now pool=4\)",
        ),
        ((1, 8, 3, 3), {"groups": 4, "pool": 4}, "smaller than pool 4"),
        ((1, 8, 8, 8), {"groups": 1, "pool": 1}, "no negatives"),
        ((1, 8, 8, 8), {"groups": 1, "patch": 1, "pool": 1, "negatives": "all"}, "no negatives"),
        ((1, 8, 8, 8), {"tau": 0.0}, "tau is 0.0"),
        ((1, 8, 8, 8), {"p": 3}, "p is 3"),
        ((1, 8, 8, 8), {"groups": 4, "pool": 1, "negatives": "some"}, "give cross_group or all"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(shape, settings, message) -> None:
    x = torch.randn(shape)
    with pytest.raises(InputError, match=message):
        omni_contrastive_loss(x, x, **settings)


def test_maps_of_two_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"two .* maps of one shape"):
        omni_contrastive_loss(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 5))
