"""The quantizer against hand-made grids and a plain loop in float64."""

import math

import pytest
import torch

from sliderquant.method.quantizer import (
    WeightFormat,
    fake_quantize,
    leading_columns,
    nearest_codes,
    quantization_grid,
    quantize_weight,
)


def fmt(bits=4, group_size=None, sym=False, dtype=torch.float64) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group_size, sym=sym, dtype=dtype)


def random_weight(rows=6, columns=32, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(weight, bits, group, sym, upper=None, lower=None):
    """One group at a time, in Python floats, from the equations."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for k, start in enumerate(range(0, weight.shape[1], group)):
            part = weight[row, start : start + group].tolist()
            hi, lo = max(*part, 0.0), min(*part, 0.0)
            if upper is not None:
                hi /= 1 + math.exp(-upper[row, k].item())
                lo /= 1 + math.exp(-lower[row, k].item())
            if sym:
                scale, zero = max(hi, -lo) / ((2**bits - 1) / 2), 0
                low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            else:
                scale = (hi - lo) / (2**bits - 1)
                scale = max(scale, 1e-5)
                zero = round(-lo / scale)
                low, high = 0, 2**bits - 1
            scale = max(scale, 1e-5)
            for j, value in enumerate(part):
                code = min(max(round(value / scale) + zero, low), high)
                out[row, start + j] = (code - zero) * scale
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("clipped", [True, False])
def test_fake_quantize_matches_the_equations(bits, group, sym, clipped) -> None:
    weight = random_weight()
    groups = weight.shape[1] // group
    logits = (None, None)
    if clipped:
        logits = (random_weight(6, groups, seed=1), random_weight(6, groups, seed=2))
    got = fake_quantize(weight, fmt(bits, group, sym), *logits)
    torch.testing.assert_close(got, by_hand(weight, bits, group, sym, *logits))


@pytest.mark.parametrize("shift", [-10.0, 10.0])
def test_grid_of_a_one_signed_group_still_holds_zero(shift) -> None:
    weight = (random_weight() + shift).unsqueeze(1)
    scale, zero = quantization_grid(weight, fmt(2))
    assert ((zero >= 0) & (zero <= 3)).all()
    assert torch.isfinite(scale).all()


def test_zero_rows_stay_exactly_zero() -> None:
    weight = random_weight()
    weight[2] = 0
    for sym in (True, False):
        assert torch.equal(fake_quantize(weight, fmt(2, 8, sym))[2], torch.zeros(32).double())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_simulated_weight_is_what_the_stored_type_reads_back(sym, dtype) -> None:
    weight = random_weight(dtype=torch.float32)
    form = fmt(3, 8, sym, dtype)
    scale, zero = quantization_grid(weight.unflatten(1, (4, 8)), form)
    code = nearest_codes(weight.unflatten(1, (4, 8)), scale, zero, form)
    stored_scale = scale.to(dtype)
    assert torch.equal(stored_scale.float(), scale)
    read_back = ((code - zero).to(dtype) * stored_scale).flatten(1)
    assert torch.equal(read_back.float(), fake_quantize(weight, form))


def test_codes_fill_the_signed_and_the_unsigned_range() -> None:
    weight = torch.linspace(-1, 1, 64, dtype=torch.float64).view(1, 1, 64)
    for sym, expected in ((True, set(range(-8, 8))), (False, set(range(16)))):
        form = fmt(4, None, sym)
        scale, zero = quantization_grid(weight, form)
        assert set(nearest_codes(weight, scale, zero, form).flatten().int().tolist()) == expected


def test_rounding_passes_the_gradient_and_clamping_stops_it() -> None:
    weight = torch.tensor([[-1.0, -0.3, 0.2, 1.0]], requires_grad=True)
    scale = torch.full((1, 1, 1), 0.25)
    zero = torch.full((1, 1, 1), 2.0)
    code = nearest_codes(weight.unsqueeze(1), scale, zero, fmt(2, dtype=torch.float32))
    code.sum().backward()
    # Grid points are -0.5 ... 0.25: the outer weights lie beyond it.
    assert code.flatten().tolist() == [0, 1, 3, 3]
    assert weight.grad.tolist() == [[0.0, 4.0, 4.0, 0.0]]


def test_clipping_logits_receive_the_gradient_of_the_step() -> None:
    weight = random_weight()
    upper = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    lower = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    grouped = weight.unflatten(1, (4, 8))
    scale, _ = quantization_grid(grouped, fmt(2, 8), upper.unsqueeze(-1), lower.unsqueeze(-1))
    scale.sum().backward()
    # d scale / d u = s'(u) max(W, 0) / (2^b - 1) with s'(0) = 1/4.
    torch.testing.assert_close(upper.grad, grouped.amax(-1).clamp(min=0) / 12)
    torch.testing.assert_close(lower.grad, -grouped.amin(-1).clamp(max=0) / 12)


def test_a_stage_quantizes_the_leading_columns_and_leaves_the_rest() -> None:
    weight = random_weight()
    half = fake_quantize(weight, fmt(2, 8), ratio=0.5)
    whole = fake_quantize(weight, fmt(2, 8))
    assert torch.equal(half[:, :16], whole[:, :16])
    assert torch.equal(half[:, 16:], weight[:, 16:])


@pytest.mark.parametrize(
    ("columns", "ratio", "group", "expected"),
    [
        (32, 0.5, None, 16),
        (33, 0.5, None, 17),
        (32, 0.5, 8, 16),
        (40, 0.5, 16, 32),
        (10, 0.3, None, 3),
        (32, 1 / 3, 32, 32),
    ],
)
def test_leading_columns_round_up_to_whole_groups(columns, ratio, group, expected) -> None:
    assert leading_columns(columns, ratio, group) == expected


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="32 input columns do not divide into groups of 5"):
        fake_quantize(random_weight(), fmt(4, 5))


@pytest.mark.parametrize(
    ("bits", "group", "sym", "dtype", "expected"),
    [
        (4, 128, True, torch.bfloat16, 4.125),
        (4, 128, False, torch.float16, 4.15625),
        (2, 64, True, torch.bfloat16, 2.25),
    ],
)
def test_bits_per_weight_match_the_published_arithmetic(bits, group, sym, dtype, expected) -> None:
    assert fmt(bits, group, sym, dtype).bits_per_weight(4096) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_integers_mean_what_was_simulated_bit_for_bit(bits, sym, dtype) -> None:
    weight = random_weight().float().repeat(2, 1).view(2, 6, 32)
    weight[1] *= 100
    upper = torch.linspace(-2, 4, 48).view(2, 6, 4)
    form = fmt(bits, 8, sym, dtype)
    quantized = quantize_weight(weight, form, upper, upper.flip(0))
    simulated = fake_quantize(weight, form, upper, upper.flip(0))
    low, high = form.code_range
    assert quantized.codes.min() >= low
    assert quantized.codes.max() <= high
    assert quantized.scale.dtype == dtype
    assert torch.equal(quantized.dequantize().float(), simulated)
    assert torch.equal(quantized[1].dequantize().float(), simulated[1])
    # Expert by expert the same as a stack of plain weights, but for the last bit of a scale: where a
    # number lies in a vector register decides how torch rounds its sigmoid.
    alone = fake_quantize(weight[1], form, upper[1], upper[0])
    torch.testing.assert_close(simulated[1], alone, rtol=1e-6, atol=0)
