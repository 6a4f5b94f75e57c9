"""Per-token rounding against numbers worked out by hand and against integers in float64."""

import pytest
import torch

from sliderquant.method.activations import ActivationFormat, fake_quantize_tokens


def integers(x, bits, sym):
    """The definition, one token at a time, with python numbers."""
    result = []
    for token in x.flatten(0, -2).double().tolist():
        low, high = min(0.0, *token), max(0.0, *token)
        if sym:
            scale = max(max(high, -low) / ((2**bits - 1) / 2), 1e-5)
            codes = [
                min(max(round(v / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in token
            ]
            result.append([code * scale for code in codes])
        else:
            scale = max((high - low) / (2**bits - 1), 1e-5)
            zero = round(-low / scale)
            codes = [min(max(round(v / scale) + zero, 0), 2**bits - 1) for v in token]
            result.append([(code - zero) * scale for code in codes])
    return torch.tensor(result, dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_token_has_a_grid_of_its_own(bits, sym) -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(-2, 3, 6, dtype=torch.float64).view(2, 3, 1) + 0.3
    got = fake_quantize_tokens(x, ActivationFormat(bits=bits, sym=sym))
    torch.testing.assert_close(got, integers(x, bits, sym))


def test_a_worked_example() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.4, 14.0]])
    # Range -1 to 14 in 15 intervals of 1, zero point 1: exact but for 0.4.
    got = fake_quantize_tokens(x, ActivationFormat(bits=4, sym=False))
    assert got.tolist() == [[-1.0, 0.0, 0.0, 14.0]]
    # Symmetric: scale 14 / 7.5, the largest code is 7.
    got = fake_quantize_tokens(x, ActivationFormat(bits=4, sym=True))
    scale = 14 / 7.5
    torch.testing.assert_close(got, torch.tensor([[-scale, 0.0, 0.0, 7 * scale]]))


@pytest.mark.parametrize("sym", [True, False])
def test_a_stage_rounds_the_leading_features_by_the_grid_of_the_whole_token(sym) -> None:
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    x[:, 9] = 30.0  # outside the leading half, inside the range
    whole = fake_quantize_tokens(x, ActivationFormat(bits=4, sym=sym))
    half = fake_quantize_tokens(x, ActivationFormat(bits=4, sym=sym, ratio=0.5))
    assert torch.equal(half[:, :5], whole[:, :5])
    assert torch.equal(half[:, 5:], x[:, 5:])


def test_zeros_stay_zeros_and_the_gradient_passes() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rounded = fake_quantize_tokens(x, ActivationFormat(bits=4, sym=False))
    assert torch.equal(rounded, torch.zeros(2, 4))
    y = torch.linspace(-3, 4, 12).view(2, 6).requires_grad_()
    fake_quantize_tokens(y, ActivationFormat(bits=8, sym=False))[:, 1:5].sum().backward()
    assert torch.isfinite(y.grad).all()
    torch.testing.assert_close(y.grad[:, 2:4], torch.ones(2, 2), atol=0.02, rtol=0)
