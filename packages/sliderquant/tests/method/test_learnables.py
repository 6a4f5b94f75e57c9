"""What is trained in a block, against the equations."""

import math

import pytest
import torch

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.config import SliderConfig
from sliderquant.method import learnables
from sliderquant.method import pieces as pieces_module
from sliderquant.method.layout import (
    COLUMNS,
    ROWS,
    ScaledParameter,
    ScalingSite,
    clamp_factor,
    scale_channels,
)
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.quantizer import WeightFormat, fake_quantize, quantize_weight
from sliderquant.method.sampling import batches


def fmt(**changes) -> WeightFormat:
    base = {"bits": 3, "group_size": 8, "sym": False, "dtype": torch.float32}
    return WeightFormat(**{**base, **changes})


@pytest.fixture
def pair():
    """A site between the rows of one weight and the columns of the next, and the weights."""
    index = torch.arange(16)
    site = ScalingSite(
        name="up -> down",
        size=16,
        parameters=(
            ScaledParameter(name="up", axis=ROWS, index=index, inverse=True),
            ScaledParameter(name="down", axis=COLUMNS, index=index, inverse=False),
        ),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(16, 16, generator=generator) for name in ("up", "down")}
    return site, tensors


def test_correction_comes_after_scaling_and_before_rounding(pair) -> None:
    """W~ = W diag(alpha) + B A / r, then the grid; up gets its rows divided."""
    site, tensors = pair
    block_learnables = BlockLearnables(tensors, fmt(), 2, torch.Generator().manual_seed(1), [site])
    with torch.no_grad():
        block_learnables.factors[0].uniform_(0.5, 2)
        for linear in block_learnables.linears:
            linear.lora_b.normal_(std=0.1)
            linear.upper.uniform_(0, 3)
            linear.lower.uniform_(0, 3)
    alpha = block_learnables.factors[0].double()
    expected = {
        "up": tensors["up"].double() / alpha[:, None],
        "down": tensors["down"].double() * alpha,
    }
    for name, linear in zip(("up", "down"), block_learnables.linears, strict=True):
        expected[name] = expected[name] + linear.lora_b.double() @ linear.lora_a.double() / 2
        torch.testing.assert_close(block_learnables.merge(tensors)[name].double(), expected[name])
        rounded = fake_quantize(expected[name].float(), fmt(), linear.upper, linear.lower)
        torch.testing.assert_close(block_learnables(tensors)[name], rounded)


def test_without_learned_effect_the_result_is_round_to_nearest(family, tiny) -> None:
    decoder = TransformersDecoder(tiny(family))
    config = SliderConfig(method="slider", wbits=4, group_size=8, channel_scale="on", lwc=False)
    block_learnables = fresh_learnables(decoder, config, torch.float32)[0]
    tensors = decoder.tensors(0)
    simulated = block_learnables(tensors)
    for name in decoder.layout(0).linears:
        expected = fake_quantize(tensors[name], block_learnables.fmt)
        assert torch.equal(simulated[name], expected), name
    for name in simulated.keys() - set(decoder.layout(0).linears):
        torch.testing.assert_close(simulated[name], tensors[name], rtol=1e-6, atol=1e-7)


def test_experts_are_trained_one_by_one(tiny) -> None:
    decoder = TransformersDecoder(tiny("mixtral"))
    block_learnables = fresh_learnables(
        decoder, SliderConfig(method="slider", wbits=2, group_size=8), torch.float32
    )[0]
    name = "mlp.experts.gate_up_proj"
    linear = block_learnables.linear(name)
    weight = decoder.tensors(0)[name]
    with torch.no_grad():
        linear.lora_b.normal_(generator=torch.Generator().manual_seed(0))
        linear.upper.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    simulated = block_learnables(decoder.tensors(0))[name]
    for expert in range(4):
        corrected = weight[expert] + linear.lora_b[expert] @ linear.lora_a[expert] / 4
        alone = fake_quantize(
            corrected, block_learnables.fmt, linear.upper[expert], linear.lower[expert]
        )
        torch.testing.assert_close(simulated[expert], alone)


def test_factors_keep_their_sign_and_a_distance_from_zero() -> None:
    factor = torch.tensor([2.0, 1e-5, -1e-5, 0.0, -0.5], requires_grad=True)
    kept = clamp_factor(factor)
    torch.testing.assert_close(kept, torch.tensor([2.0, 1e-2, -1e-2, 1e-2, -0.5]))
    kept.sum().backward()
    assert torch.equal(factor.grad, torch.ones(5))


def test_scaling_a_gain_that_is_stored_minus_one() -> None:
    touch = ScaledParameter(
        name="norm", axis=ROWS, index=torch.tensor([0, -1]), inverse=True, offset=1.0
    )
    site = ScalingSite(name="norm -> qkv", size=1, parameters=(touch,))
    changed = scale_channels({"norm": torch.tensor([0.5, 0.5])}, [site], [torch.tensor([2.0])])
    # (1 + 0.5) / 2 = 0.75 = 1 - 0.25; the second entry is not touched.
    torch.testing.assert_close(changed["norm"], torch.tensor([-0.25, 0.5]))


def test_scaled_gains_are_simulated_as_they_will_be_stored(pair) -> None:
    touch = ScaledParameter(name="norm", axis=ROWS, index=torch.arange(16), inverse=True)
    site = ScalingSite(name="norm -> up", size=16, parameters=(touch,))
    tensors = pair[1] | {"norm": torch.rand(16)}
    weights = {name: tensors[name] for name in ("up", "down")}
    block_learnables = BlockLearnables(
        weights, fmt(dtype=torch.bfloat16), 2, torch.Generator().manual_seed(1), [site]
    )
    with torch.no_grad():
        block_learnables.factors[0].uniform_(0.5, 2)
    expected = (tensors["norm"] / block_learnables.factors[0]).bfloat16().float()
    assert torch.equal(block_learnables(tensors)["norm"], expected)


def test_batches_of_other_seeds_differ() -> None:
    orders = [[i.tolist() for _, i in batches(8, 2, 1, seed)] for seed in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_that_wait_are_packed_and_come_back_as_they_were(bits, sym) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    made = BlockLearnables({"w": weight}, fmt(bits=bits, sym=sym), 4, torch.Generator())
    linear = made.linear("w")
    linear.closed_form = quantize_weight(weight, linear.fmt)
    before, simulated = linear.closed_form, made({"w": weight})["w"]

    made.pack_codes()
    assert linear._closed_form.tensors["weight_packed"].nbytes == weight.numel() * bits / 8
    assert torch.equal(linear.closed_form.codes, before.codes)
    assert torch.equal(made({"w": weight})["w"], simulated)
    assert torch.equal(made.to_storage({"w": weight})["w"].codes, before.codes)
    made.forget_codes()
    assert linear.closed_form is None


def rounded_learnables(weights, fmt, packed: bool):
    """Learnables of a block whose weights are rounded already."""
    learnables = BlockLearnables(weights, fmt, 2, torch.Generator().manual_seed(1))
    for name in weights:
        learnables.linear(name).closed_form = quantize_weight(weights[name], fmt)
    if packed:
        learnables.pack_codes()
    learnables.train_scales()
    return learnables


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_rounded_weights_are_simulated_and_stored_alike(pair, dtype, packed) -> None:
    weights = {name: pair[1][name] for name in ("up", "down")}
    learnables = rounded_learnables(weights, fmt(dtype=dtype), packed)

    # Without training it is what was rounded, to the bit.
    for name, value in learnables(weights).items():
        assert torch.equal(value, learnables.linear(name).closed_form.dequantize().float())

    # The factor is exp(s), codes and zero points stay, and the scale is one of its stored type.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for linear in learnables.linears:
            linear.log_rescale.normal_(std=0.1, generator=generator)
    stored = learnables.to_storage(weights)
    for name, value in learnables(weights).items():
        linear, weight = learnables.linear(name), stored[name]
        before = linear.closed_form
        assert torch.equal(weight.codes, before.codes)
        expected = before.scale.double() * linear.log_rescale.double().exp()
        bits = {torch.bfloat16: 8, torch.float32: 23}[dtype]
        torch.testing.assert_close(weight.scale.double(), expected, rtol=2.0**-bits, atol=0)
        assert weight.scale.dtype == dtype
        assert torch.equal(value, weight.dequantize().float())


def test_a_lean_block_simulates_and_trains_what_another_one_does(pair) -> None:
    weights = {name: pair[1][name] for name in ("up", "down")}
    formats = {"up": fmt(bits=8), "down": fmt(bits=16)}
    results = []
    for recompute in (False, True):
        learnables = BlockLearnables(
            weights, fmt(), 2, torch.Generator().manual_seed(1), formats=formats
        )
        learnables.recompute = recompute
        values = learnables(weights)
        sum(value.square().sum() for value in values.values()).backward()
        results.append((values, learnables.linear("up").upper.grad))
    (plain, gradient), (lean, lean_gradient) = results
    assert all(torch.equal(plain[name], lean[name]) for name in weights)
    assert torch.equal(lean["down"], weights["down"])
    torch.testing.assert_close(lean_gradient, gradient)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_of_a_scale_is_that_of_levels_times_scale(pair, recompute) -> None:
    weights = {name: pair[1][name] for name in ("up", "down")}
    learnables = rounded_learnables(weights, fmt(), packed=True)
    learnables.recompute = recompute
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}
    sum((learnables(weights)[name] * direction[name]).sum() for name in weights).backward()
    for name in weights:
        linear = learnables.linear(name)
        values = linear.closed_form.dequantize() * direction[name]
        expected = values.unflatten(1, (linear.log_rescale.shape[1], -1)).sum(-1)
        torch.testing.assert_close(linear.log_rescale.grad, expected)

    # Of the weight's size nothing is kept but the codes.
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        learnables(weights)
    assert max(tensor.numel() for tensor in saved) < weights["up"].numel()

    # Nothing else is trained: the rest is final.
    (group,) = learnables.parameter_groups(1.0, 2.0, 3.0, 4.0)
    assert group["lr"] == 4.0
    assert {id(p) for p in group["params"]} == {id(x.log_rescale) for x in learnables.linears}
    assert set(learnables.trained_by("combined")) == {f"linears.{i}.log_rescale" for i in (0, 1)}
    assert len(learnables.trained_by("slider")) == 2 * 4


def test_clipping_can_be_left_out(pair) -> None:
    block_learnables = BlockLearnables(pair[1], fmt(), 2, torch.Generator(), clipping=False)
    assert [group["lr"] for group in block_learnables.parameter_groups(1.0, 2.0, 3.0)] == [1.0]
    assert torch.sigmoid(block_learnables.linears[0].upper).unique().item() == 1
    assert math.isfinite(block_learnables(pair[1])["up"].sum().item())


@pytest.mark.parametrize("shape", [(24, 16), (3, 8, 16)])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize(
    ("is_accelerator", "limit", "pieces"),
    [
        (False, 5 * 16, {2: 5, 3: 6}),  # five rows, which divides neither shape
        (True, 2 * 8 * 16, {2: 2, 3: 2}),  # 16 rows, or two experts
        (True, 2**20, {2: 1, 3: 1}),
    ],
)
def test_simulation_in_pieces_has_the_same_values_and_gradients(
    shape, ratio, is_accelerator, limit, pieces, monkeypatch
) -> None:
    name = "ACCELERATOR_WEIGHTS_PER_PIECE" if is_accelerator else "WEIGHTS_PER_PIECE"
    monkeypatch.setattr(pieces_module, name, limit)
    monkeypatch.setattr(pieces_module, "is_accelerator", lambda device: is_accelerator)
    assert len(pieces_module.row_pieces(shape, torch.device("cpu"))) == pieces[len(shape)]
    generator = torch.Generator().manual_seed(0)
    linear = learnables.LinearLearnables(shape, fmt(), 2, generator).double()
    with torch.no_grad():
        for parameter in (linear.lora_b, linear.upper, linear.lower):
            parameter.normal_(generator=generator)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    into = torch.randn(shape, generator=generator, dtype=torch.float64)
    leaves = [weight, linear.lora_a, linear.lora_b, linear.upper, linear.lower]
    results = []
    for simulate in (linear, linear.forward_in_pieces):
        value = simulate(weight, ratio)
        results.append((value, *torch.autograd.grad(value, leaves, into)))
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
