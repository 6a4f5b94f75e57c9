"""Compensated rounding against textbook computations in float64, and on a trained model."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sliderquant.adapters.simulation import (
    fresh_learnables,
    model_logits,
    simulated_logits,
    simulated_weights,
    weight_format,
)
from sliderquant.adapters.text import calibration_samples, chunks, encode
from sliderquant.config import SliderConfig
from sliderquant.method.activations import activation_format, fake_quantize_tokens
from sliderquant.method.calibration import calibrate
from sliderquant.method.decoder import run_blocks
from sliderquant.method.error_compensation import (
    DAMPING,
    coordinate_descent_sweep,
    damped_hessian,
    refit_scales,
    ridge_update,
    round_weight,
    round_with_error_feedback,
)
from sliderquant.method.layout import layer_groups
from sliderquant.method.metrics import perplexity
from sliderquant.method.quantizer import WeightFormat, quantization_grid, quantize_weight
from sliderquant.method.round_to_nearest import rtn_weights


def settings(**changes) -> SliderConfig:
    base = {"wbits": 2, "group_size": 32, "sym": False, "batch_size": 4, "nsamples": 16}
    return SliderConfig(**{**base, "seqlen": 64, "method": "compensated", **changes})


@pytest.fixture
def samples(loaded, corpus):
    stream = encode(corpus.train[:10], loaded.tokenizer)
    return calibration_samples(stream, 16, 64, 0)


def layer(columns: int, seed: int = 0):
    """A weight, correlated inputs [n, in] and what the output lacks [n, out]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(400, columns, generator=generator) @ (mix + torch.eye(columns))
    weight = torch.randn(6, columns, generator=generator)
    return weight, x, torch.randn(400, 6, generator=generator)


def brain_surgeon(weight, scale, zero, high, h):
    """Codes by the book: after each column the inverse Hessian of the remaining ones is taken anew."""
    weight, scale, zero, h = (np.array(t.double()) for t in (weight, scale, zero, h))
    remaining = list(np.argsort(-np.diag(h), kind="stable"))
    codes = np.zeros_like(weight)
    while remaining:
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        j, *later = remaining
        codes[:, j] = np.clip(np.round(weight[:, j] / scale[:, j]) + zero[:, j], 0, high)
        error = (weight[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / inverse[0, 0]
        weight[:, later] -= np.outer(error, inverse[0, 1:])
        remaining = later
    return codes


@pytest.mark.parametrize("columns", [16, 300])  # in one column block, and in three
def test_codes_are_those_of_the_textbook_procedure(columns) -> None:
    weight, x, _ = layer(columns)
    fmt = WeightFormat(bits=3, group_size=None, sym=False, dtype=torch.float32)
    grid = quantization_grid(weight.unsqueeze(1), fmt)
    scale, zero = (t.squeeze(1).expand_as(weight) for t in grid)
    h = damped_hessian((x.T @ x).double())
    result = round_with_error_feedback(weight, scale, zero, fmt, h)
    expected = torch.tensor(brain_surgeon(weight, scale, zero, 7, h), dtype=torch.float32)
    # In float32 a value in the middle between two codes may fall to either side.
    assert (result != expected).float().mean() < 0.01


def test_regression_minimises_the_damped_squared_error() -> None:
    weight, x, error = layer(16)
    moment = (x.T @ x).double()
    result = ridge_update(weight, damped_hessian(moment), (x.T @ error).double())
    ridge = math.sqrt(DAMPING * moment.diagonal().mean())
    stacked = np.vstack([x.numpy(), ridge * np.eye(16)])
    wanted = np.vstack([error.numpy(), np.zeros((16, 6))])
    change = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(result, weight.numpy() + change, atol=1e-4)


def cost(target, levels, scale, h) -> float:
    """tr((W* - D c) H (W* - D c)^T), in float64."""
    rest = target.double() - (levels.double() * scale.double().unsqueeze(-1)).flatten(-2)
    return float((rest @ h * rest).sum())


def test_scales_are_those_of_least_squares() -> None:
    target, x, _ = layer(32)
    h = (x.T @ x).double()
    levels = torch.randint(-1, 3, (6, 4, 8), generator=torch.Generator().manual_seed(3)).float()
    result = refit_scales(levels, torch.ones(6, 4), target * 0 + _combined(levels), h)
    torch.testing.assert_close(result, torch.full((6, 4), 1.25), rtol=1e-4, atol=0)
    factor = np.linalg.cholesky(h.numpy()).T  # |L^T r|^2 = r H r^T
    loose = torch.full((6, 4), 1e-9)
    for row in range(6):
        spread = torch.block_diag(*levels[row].unsqueeze(1)).double().numpy()
        best = np.linalg.lstsq(factor @ spread.T, factor @ target[row].double().numpy(), rcond=None)
        near = torch.tensor(
            best[0]
        ).abs()  # within a factor of two of the answer, if it is positive
        kept = refit_scales(levels, near.expand(6, 4).float() + loose, target, h)[row]
        wanted = torch.where(torch.tensor(best[0]) > 0, torch.tensor(best[0]), near).float()
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-6)


def _combined(levels):
    return (1.25 * levels).flatten(-2)


def test_a_sweep_leaves_no_code_that_a_single_change_would_improve() -> None:
    target, x, _ = layer(24)
    fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
    grid = quantization_grid(target.unsqueeze(1), fmt)
    scale, zero = (t.squeeze(1).expand_as(target) for t in grid)
    h = damped_hessian((x.T @ x).double())
    code = round_with_error_feedback(target, scale, zero, fmt, h)
    costs = [cost(target, (code - zero).unsqueeze(1), scale[:, :1], h)]
    for _ in range(20):
        code = coordinate_descent_sweep(code, scale, zero, fmt, target, h.float())
        costs.append(cost(target, (code - zero).unsqueeze(1), scale[:, :1], h))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))
    assert costs[-1] < costs[0]
    for j in range(24):
        for change in (-1, 1):
            other = code.clone()
            other[:, j] = (other[:, j] + change).clamp(0, 3)
            assert cost(target, (other - zero).unsqueeze(1), scale[:, :1], h) >= costs[-1] * (
                1 - 1e-6
            )


@pytest.mark.parametrize("sym", [False, True])
def test_unrelated_inputs_get_the_nearest_codes_on_a_grid_that_fits_better(sym) -> None:
    weight, _, _ = layer(32)
    fmt = WeightFormat(bits=2, group_size=16, sym=sym, dtype=torch.bfloat16)
    result = round_weight(
        weight, fmt, torch.eye(32, dtype=torch.float64), torch.zeros(32, 6, dtype=torch.float64)
    )
    scale = result.scale.float().repeat_interleave(16, dim=-1)
    zero = 0 if sym else result.zero.repeat_interleave(16, dim=-1)
    wanted = ((weight / scale).round() + zero).clamp(*fmt.code_range)
    assert torch.equal(result.codes.float(), wanted)
    nearest = quantize_weight(weight, fmt).dequantize()
    assert (result.dequantize() - weight).norm() < (nearest - weight).norm()


def test_inputs_that_are_never_active_are_no_trouble() -> None:
    weight, x, error = layer(16)
    fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
    for used in (x * (torch.arange(16) < 8), x * 0):
        moment, cross = (used.T @ used).double(), (used.T @ error).double()
        assert round_weight(weight, fmt, moment, cross).dequantize().isfinite().all()


def test_every_rounded_linear_is_solved_once_in_computing_order(family, tiny) -> None:
    from sliderquant.adapters.decoder import TransformersDecoder

    decoder = TransformersDecoder(tiny(family))
    layout = decoder.layout(0)
    groups = layer_groups(layout)
    names = [name for group in groups for name in group.weights]
    assert sorted(names) == sorted(n for n in layout.linears if ".experts." not in n)
    assert "self_attn.o_proj.weight" in groups[1].weights
    aims = [group.target_module for group in groups[1::2]]
    if family.startswith("gemma"):
        assert aims == [None, None]
    else:
        assert aims == ["post_attention_layernorm", ""][: len(aims)]


def test_it_recovers_most_of_what_rounding_to_nearest_costs(
    decoder, loaded, samples, corpus
) -> None:
    config = settings()
    learnables = fresh_learnables(decoder, config, torch.float32)
    seen = []
    calibrate(decoder, samples, [], learnables, config, on_block=seen.append)
    assert seen == list(range(decoder.depth))
    fmt = weight_format(config, torch.float32)
    arms = {
        "full": None,
        "nearest": [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)],
        "compensated": simulated_weights(decoder, learnables),
    }
    batches = list(chunks(encode([corpus.code[:20_000]], loaded.tokenizer), 64, 32))
    nll = {
        name: math.log(perplexity(simulated_logits(decoder, weights), batches))
        for name, weights in arms.items()
    }
    assert nll["nearest"] - nll["compensated"] > 0.5 * (nll["nearest"] - nll["full"])


def test_later_blocks_make_up_for_the_error_of_earlier_ones(decoder, samples) -> None:
    """With 8 bits, rounding costs next to nothing: what shows is the regression on the stream."""
    config = settings(wbits=8)
    learnables = fresh_learnables(decoder, config, torch.float32)

    def damaged(name, hidden):
        noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        return hidden + 0.1 * noise * hidden.std() if name == "x_q" else hidden.clone()

    calibrate(decoder, samples, [], learnables, config, cache=damaged)
    start = decoder.block_inputs(samples)
    blocks = range(decoder.depth)
    exact = run_blocks(decoder, blocks, start, 4)
    errors = [
        (run_blocks(decoder, blocks, damaged("x_q", start), 4, made) - exact).square().mean()
        for made in (fresh_learnables(decoder, config, torch.float32), learnables)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_layers_aim_at_the_full_precision_output_from_rounded_inputs(decoder, samples) -> None:
    """With 8-bit weights and 4-bit activations, the error left is that of ridge regression."""
    config = settings(wbits=8, abits=4, channel_scale="off")
    learnables = fresh_learnables(decoder, config, torch.float32)
    calibrate(decoder, samples, [], learnables, config)
    block = decoder.blocks[0]
    exact = block.input_layernorm(decoder.block_inputs(samples)).flatten(0, 1).double()
    x = fake_quantize_tokens(exact.float(), activation_format(config)).double()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(block.self_attn, name).weight
        target = exact @ weight.double().T
        ours = learnables[0].linear(f"self_attn.{name}.weight")(weight).double()
        # The penalty, on the distance from the weight, as rows of an ordinary least-squares problem.
        penalty = (DAMPING * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1]).double()
        rows, aims = torch.cat([x, penalty]), torch.cat([target, penalty @ weight.double().T])
        best = torch.linalg.lstsq(rows, aims).solution
        errors = [float((x @ w - target).norm()) for w in (weight.double().T, ours.T, best)]
        # What 8 bits leave over is small against what there is to gain.
        assert errors[0] - errors[1] > 0.9 * (errors[0] - errors[2])


@pytest.mark.slow
def test_it_recovers_what_outlier_channels_cost_where_activations_are_rounded(
    decoder, loaded, samples
) -> None:
    with torch.no_grad():
        for block in decoder.blocks:
            attention, mlp = block.self_attn, block.mlp
            block.input_layernorm.weight[[3, 40]] *= 30
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
                reader.weight[:, [3, 40]] /= 30
            mlp.up_proj.weight[[5, 77]] *= 30
            mlp.down_proj.weight[:, [5, 77]] /= 30
    expected = model_logits(loaded.model)(samples)

    def error(**changes) -> float:
        config = settings(wbits=4, abits=4, **changes)
        learnables = fresh_learnables(decoder, config, torch.float32)
        calibrate(decoder, samples, [], learnables, config)
        weights = simulated_weights(decoder, learnables)
        logits = simulated_logits(decoder, weights, activation_format(config))(samples)
        return (logits - expected).square().mean().item()

    assert error() < 0.3 * error(channel_scale="off")
