"""The two views against a real DCT and a sum over tokens."""

import pytest
import torch
from torch.nn import functional as F

from scalekd.method.feature_mimicking import mimic_loss, remove_spatial_mean

dtype = torch.float64


def test_the_second_view_is_a_dct_without_its_constant_coefficient() -> None:
    fft = pytest.importorskip("scipy.fft")
    h, w, channels = 4, 6, 3
    x = torch.randn(2, h * w, channels, dtype=dtype)
    grid = x.numpy().reshape(2, h, w, channels)
    spectrum = fft.dctn(grid, type=2, axes=(1, 2), norm="ortho")
    spectrum[:, 0, 0] = 0
    expected = fft.idctn(spectrum, type=2, axes=(1, 2), norm="ortho").reshape(2, h * w, channels)
    assert torch.allclose(remove_spatial_mean(x), torch.from_numpy(expected), atol=1e-12)


def test_the_ac_loss_is_the_full_loss_of_both_filtered_by_a_dct() -> None:
    fft = pytest.importorskip("scipy.fft")

    def filtered(x: torch.Tensor) -> torch.Tensor:
        spectrum = fft.dctn(x.numpy().reshape(2, 4, 4, 5), type=2, axes=(1, 2))
        spectrum[:, 0, 0] = 0
        return torch.from_numpy(fft.idctn(spectrum, type=2, axes=(1, 2)).reshape(2, 16, 5))

    a, b = torch.randn(2, 2, 16, 5, dtype=dtype)
    cosine = F.cosine_similarity(filtered(a), filtered(b), dim=-1)
    assert mimic_loss(a, b, "ac").item() == pytest.approx(
        (2 * (1 - cosine)).mean().item(), abs=1e-12
    )


@pytest.mark.parametrize(
    ("tokens", "summed", "mean"), [(49, 0.08, 3.92), (256, 0.016, 4.096), (576, 0.008, 4.608)]
)
def test_mean_times_token_weight_is_the_released_sum(
    tokens: int, summed: float, mean: float
) -> None:
    a, b = torch.randn(2, 3, tokens, 8, dtype=dtype)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    released = summed * ((unit(a) - unit(b)) ** 2).sum() / len(a)
    assert mean * mimic_loss(a, b).item() == pytest.approx(released.item(), rel=1e-12)


def test_the_loss_of_equal_features_is_zero_and_of_opposite_ones_four() -> None:
    a = torch.randn(2, 9, 4)
    for view in ("full", "ac"):
        assert mimic_loss(a, a, view).item() == pytest.approx(0, abs=1e-6)
        assert mimic_loss(-a, a, view).item() == pytest.approx(4, abs=1e-5)


def test_a_scale_changes_nothing_and_the_ac_view_ignores_an_offset() -> None:
    a, b = torch.randn(2, 2, 9, 4, dtype=dtype)
    for view in ("full", "ac"):
        assert mimic_loss(7 * a, 0.3 * b, view).item() == pytest.approx(
            mimic_loss(a, b, view).item()
        )
    offset = torch.randn(2, 1, 4, dtype=dtype)
    assert mimic_loss(a + offset, b, "ac").item() == pytest.approx(mimic_loss(a, b, "ac").item())
    assert abs(mimic_loss(a + offset, b).item() - mimic_loss(a, b).item()) > 1e-3


def test_gradients_reach_the_student_only() -> None:
    a, b = (torch.randn(2, 9, 4, requires_grad=True) for _ in range(2))
    (mimic_loss(a, b) + mimic_loss(a, b, "ac")).backward()
    assert b.grad is None
    assert a.grad is not None
    assert a.grad.abs().max() > 0


def test_half_precision_features_are_compared_in_float32() -> None:
    a, b = torch.randn(2, 2, 9, 64)
    loss = mimic_loss(a.bfloat16(), b.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mimic_loss(a, b).item(), abs=1e-2)


def test_a_single_token_keeps_the_ac_loss_finite() -> None:
    a = torch.randn(2, 1, 4, requires_grad=True)
    mimic_loss(a, torch.randn(2, 1, 4), "ac").backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_different_shapes_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"\(2, 9, 4\) and teacher features \(2, 4, 4\) differ"):
        mimic_loss(torch.zeros(2, 9, 4), torch.zeros(2, 4, 4))
