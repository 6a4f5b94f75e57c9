"""Compensated rounding against textbook computations in float64, and on a trained model."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import (
    fresh_learnables,
    model_logits,
    simulated_logits,
    simulated_weights,
    weight_format,
)
from sliderquant.adapters.text import calibration_samples, chunks, encode
from sliderquant.config import SliderConfig
from sliderquant.method import block_rounding, moments, ridge
from sliderquant.method.activations import activation_format, fake_quantize_tokens
from sliderquant.method.calibration import calibrate
from sliderquant.method.decoder import run_blocks
from sliderquant.method.error_compensation import (
    Grid,
    coordinate_descent_sweep,
    corrected_weight,
    refit_scales,
    resolves_codes,
    round_and_refine,
    round_in_better_range,
    round_layers,
    round_with_error_feedback,
    search_grid,
    whole_range_grid,
)
from sliderquant.method.layout import layer_groups
from sliderquant.method.metrics import perplexity
from sliderquant.method.moments import GroupMoments, Sums, run_inside
from sliderquant.method.quantizer import WeightFormat, quantization_grid, quantize_weight
from sliderquant.method.ridge import DAMPING, HeldOutScore, factorize, ridge_update
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


def grid_of(weight, fmt) -> Grid:
    """The grid of a weight [out, in] without clipping."""
    size = fmt.columns_per_group(weight.shape[1])
    scale, zero = quantization_grid(weight.unflatten(-1, (-1, size)), fmt)
    return Grid(scale=scale.squeeze(-1).T, zero=zero.squeeze(-1).T, group_size=size, fmt=fmt)


def moments_of(weight, x, error, strength=0.0) -> GroupMoments:
    return GroupMoments(
        weight=weight,
        through_weight=False,
        second=(x.T @ x).double(),
        cross=(x.T @ error).double(),
        strength=torch.tensor(strength),
    )


def damped(moment):
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).double()


def rounded_layers(moments, outputs, fmt):
    return round_layers(*corrected_weight(moments), outputs, fmt)


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
    grid = grid_of(weight, fmt)
    curvature = factorize((x.T @ x).double())
    h = damped((x.T @ x).double())
    result = round_with_error_feedback(
        weight.T, grid, curvature.order, curvature.inverse_factor()
    ).T
    scale, zero = (t.T.expand_as(weight) for t in (grid.scale, grid.zero))
    expected = torch.tensor(brain_surgeon(weight, scale, zero, 7, h), dtype=torch.float32)
    # In float32 a value in the middle between two codes may fall to either side.
    assert (result != expected).float().mean() < 0.01


@pytest.mark.parametrize("at_once", [2048, 7])  # columns of the inverse: all, and some at a time
def test_a_matrix_is_factorised_once_for_solutions_and_for_feedback(at_once, monkeypatch) -> None:
    monkeypatch.setattr(ridge, "PANEL_COLUMNS", at_once)
    _, x, error = layer(24)
    h, cross = damped((x.T @ x).double()), (x.T @ error).double()
    curvature = factorize((x.T @ x).double(), torch.float64)
    torch.testing.assert_close(curvature.hessian, h)
    np.testing.assert_allclose(curvature.solve(cross), np.linalg.solve(h, cross), rtol=1e-9)
    u, order = curvature.inverse_factor(), curvature.order
    assert torch.equal(u, u.triu())
    inverse = np.linalg.inv(h[order][:, order])
    np.testing.assert_allclose(u.T @ u, inverse, rtol=1e-8, atol=1e-12)
    assert torch.equal(h.diagonal()[order], h.diagonal().sort(descending=True).values)


def test_regression_minimises_the_damped_squared_error() -> None:
    _, x, error = layer(16)
    moment = (x.T @ x).double()
    result = ridge_update(factorize(moment), (x.T @ error).double())
    penalty = math.sqrt(DAMPING * moment.diagonal().mean())
    stacked = np.vstack([x.numpy(), penalty * np.eye(16)])
    wanted = np.vstack([error.numpy(), np.zeros((16, 6))])
    change = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    np.testing.assert_allclose(result, change, atol=1e-4)


@pytest.mark.parametrize("through_weight", [False, True])
def test_the_strength_is_the_one_with_the_least_error_on_held_out_samples(through_weight) -> None:
    weight, x, _ = (t.double() for t in layer(16))
    update = torch.randn(16, 16 if through_weight else 6, dtype=torch.float64)
    lacking = 0.3 * x @ update + torch.randn(400, update.shape[1]).double()
    readout = weight.T if through_weight else torch.eye(6, dtype=torch.float64)

    def strength_for(wanted) -> float:
        score = HeldOutScore(update, weight if through_weight else None)
        for tokens, rest in zip(x.split(150), wanted.split(150), strict=True):
            score.add(tokens, rest)
        return float(score.strength())

    def missed(strength: float) -> float:
        return float(((strength * x @ update - lacking) @ readout).square().sum())

    best = min(np.linspace(0, 1, 1001), key=missed)
    assert strength_for(lacking) == pytest.approx(best, abs=6e-4)
    assert 0.1 < best < 0.6
    # An update that makes held-out samples worse is not made at all.
    assert strength_for(-lacking) == 0


@pytest.mark.parametrize("through_weight", [False, True])
def test_an_update_that_only_fits_noise_is_left_out(through_weight) -> None:
    weight, x, _ = layer(64)
    weight = torch.cat([weight] * 11)  # more rows than half of the columns
    generator = torch.Generator().manual_seed(5)
    width = 64 if through_weight else 66
    noise = torch.randn(400, width, generator=generator)
    signal = 0.5 * x @ torch.randn(64, width, generator=generator)
    strengths = []
    for lacking in (noise, signal):
        # 64 unknowns and 80 tokens to fit them, 320 held out.
        sums = Sums(weight, through_weight=through_weight)
        sums.add([(x[:80], lacking[:80])])
        score = sums.fit()
        score.add(x[80:], lacking[80:])
        strengths.append(float(score.strength()))
    assert strengths[0] < 0.05
    assert strengths[1] > 0.9


def test_layers_of_a_group_are_rounded_as_they_would_be_alone() -> None:
    weight, x, error = layer(32)
    fmt = WeightFormat(bits=2, group_size=8, sym=False, dtype=torch.bfloat16)

    def rounded(rows, outputs):
        return rounded_layers(moments_of(weight[rows], x, error[:, rows], 0.5), outputs, fmt)

    together = rounded(slice(0, 6), [4, 2])
    for both, rows in zip(together, (slice(0, 4), slice(4, 6)), strict=True):
        (alone,) = rounded(rows, [rows.stop - rows.start])
        assert torch.equal(both.codes, alone.codes)
        assert torch.equal(both.scale, alone.scale)
        assert torch.equal(both.zero, alone.zero)


def cost(target, levels, scale, h) -> float:
    """tr((W* - D c) H (W* - D c)^T), in float64."""
    rest = target.double() - (levels.double() * scale.double().unsqueeze(-1)).flatten(-2)
    return float((rest @ h * rest).sum())


def refit(levels, scale, target, h):
    """``refit_scales`` for levels [out, groups, g] of a weight [out, in]."""
    fmt = WeightFormat(bits=4, group_size=levels.shape[2], sym=True, dtype=torch.float32)
    grid = Grid(scale=scale.T, zero=torch.zeros_like(scale.T), group_size=levels.shape[2], fmt=fmt)
    return refit_scales(levels.flatten(1).T, grid, target.T, h).T


def refit_often(levels, scale, target, h):
    """Steps that each lower the error most along their direction, until nothing is left to lower."""
    for _ in range(500):
        scale = refit(levels, scale, target, h)
    return scale


def test_step_after_step_scales_become_those_of_least_squares() -> None:
    target, x, _ = layer(32)
    target, h = target.double(), (x.T @ x).double()
    levels = torch.randint(-1, 3, (6, 4, 8), generator=torch.Generator().manual_seed(3)).double()
    result = refit_often(levels, torch.ones(6, 4).double(), target * 0 + _combined(levels), h)
    torch.testing.assert_close(result, torch.full((6, 4), 1.25).double(), rtol=1e-6, atol=0)

    # A weight that is near to what such scales can give, so that none of them is negative.
    target, rows = target * 0.1 + _combined(levels), 0
    factor = np.linalg.cholesky(h.numpy()).T  # |L^T r|^2 = r H r^T
    for row in range(6):
        spread = torch.block_diag(*levels[row].unsqueeze(1)).double().numpy()
        best, *_ = np.linalg.lstsq(factor @ spread.T, factor @ target[row].numpy(), rcond=None)
        if (
            best > 0
        ).all():  # a scale stays as it is where the answer is not within a factor of two
            wanted, rows = torch.tensor(best), rows + 1
            near = (wanted * 0.8).expand(6, 4)
            found = refit_often(levels, near, target, h)[row]
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert rows > 0


def test_one_step_solves_a_row_with_one_scale() -> None:
    target, x, _ = layer(32)
    h = (x.T @ x).double()
    levels = torch.randint(-1, 3, (6, 1, 32), generator=torch.Generator().manual_seed(3)).double()
    best = (levels[:, 0] @ h * target).sum(1) / (levels[:, 0] @ h * levels[:, 0]).sum(1)
    result = refit(levels, best.abs().unsqueeze(1) * 0.8, target.double(), h)
    torch.testing.assert_close(result[best > 0], best[best > 0].unsqueeze(1))
    assert (best > 0).any()


def test_one_step_lowers_the_error_most_of_the_way() -> None:
    target, x, _ = layer(32)
    h = (x.T @ x).double()
    levels = torch.randint(-1, 3, (6, 4, 8), generator=torch.Generator().manual_seed(3)).double()
    rows = target.double() * 0.1 + _combined(levels)
    start = torch.ones(6, 4).double()
    before = cost(rows, levels, start, h)
    after = cost(rows, levels, refit(levels, start, rows, h), h)
    best = 0.0
    factor = np.linalg.cholesky(h.numpy()).T
    for row in range(6):
        spread = torch.block_diag(*levels[row].unsqueeze(1)).numpy()
        _, residual, *_ = np.linalg.lstsq(factor @ spread.T, factor @ rows[row].numpy(), rcond=None)
        best += float(residual[0])
    assert before - after > 0.75 * (before - best)


def test_levels_that_are_all_zero_keep_their_scale() -> None:
    target, x, _ = layer(32)
    levels = torch.zeros(6, 4, 8)
    scale = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(refit(levels, scale, target, x.T @ x), scale)


@pytest.mark.parametrize("sym", [False, True])
def test_the_range_is_the_one_in_which_nearest_rounding_errs_least(sym) -> None:
    weight, _, _ = layer(64)
    weight[:, 5] *= 6  # one large weight in each row's first group
    fmt = WeightFormat(bits=2, group_size=32, sym=sym, dtype=torch.float32)
    grid = search_grid(weight.T, fmt)
    for row in range(6):
        for group in range(2):
            part = weight[row, 32 * group : 32 * group + 32].numpy()
            low, high = min(part.min(), 0), max(part.max(), 0)
            errors = []
            for share in np.linspace(0.4, 1, 13):
                scale = share * (max(high, -low) / 1.5 if sym else (high - low) / 3)
                zero = 0 if sym else np.round(-low / (high - low) * 3)
                bounds = (-2, 1) if sym else (0, 3)
                codes = np.clip(np.round(part / scale) + zero, *bounds)
                errors.append((((codes - zero) * scale - part) ** 2).sum())
            scale, zero = grid.scale[group, row].item(), grid.zero[group, row].item()
            codes = np.clip(np.round(part / scale) + zero, *fmt.code_range)
            reached = (((codes - zero) * scale - part) ** 2).sum()
            assert reached == pytest.approx(min(errors), rel=1e-4)


def test_each_row_has_the_range_with_which_its_output_errs_less() -> None:
    weight, x, _ = layer(64)
    weight[:3, 5] *= (
        8  # a narrow range suits rows with one large weight, the whole range the others
    )
    fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
    curvature = factorize((x.T @ x).double())
    factor = curvature.inverse_factor()
    h = damped((x.T @ x).double())

    def errors(codes, grid):
        lacking = (weight.T - grid.values(codes)).double()
        return torch.stack([d @ h @ d for d in lacking.T])

    each = []
    for grid in (search_grid(weight.T, fmt), whole_range_grid(weight.T, fmt)):
        codes = round_with_error_feedback(weight.T, grid, curvature.order, factor)
        each.append(errors(codes, grid))
    codes, grid = round_in_better_range(weight.T.contiguous(), fmt, curvature)
    torch.testing.assert_close(errors(codes, grid), torch.minimum(*each), rtol=1e-4, atol=1e-6)
    assert (each[0] < each[1]).any()
    assert (each[1] < each[0]).any()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_the_refined_weight_is_no_worse_as_it_is_stored(bits, dtype, group_size, sym) -> None:
    # Inputs of which a few directions hold most, as in language models.
    generator = torch.Generator().manual_seed(5)
    directions = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    x = torch.randn(2048, 256, generator=generator) / torch.arange(1, 257) @ directions.T
    target = torch.randn(96, 256, generator=generator).to(dtype).float().T.contiguous()
    fmt = WeightFormat(bits=bits, group_size=group_size, sym=sym, dtype=dtype)
    curvature = factorize((x.T @ x).double())

    def stored_error(codes, grid):
        stored = grid.values(codes).to(dtype).double()
        lacking = target.double() - stored
        return (lacking * (curvature.hessian.double() @ lacking)).sum().item()

    before = stored_error(*round_in_better_range(target, fmt, curvature))
    after = stored_error(*round_and_refine(target, fmt, curvature))
    assert after < 1.02 * before
    assert after < before or bits > 4
    assert resolves_codes(fmt) == (dtype == torch.float16 or bits < 6)


def test_the_whole_range_ends_at_the_smallest_and_largest_weight() -> None:
    weight, _, _ = layer(32)
    fmt = WeightFormat(bits=4, group_size=16, sym=False, dtype=torch.float32)
    grid = whole_range_grid(weight.T, fmt)
    groups = weight.unflatten(1, (2, 16))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    torch.testing.assert_close(grid.scale.T, span / 15)


def _combined(levels):
    return (1.25 * levels).flatten(-2)


def test_a_sweep_leaves_no_code_that_a_single_change_would_improve() -> None:
    target, x, _ = layer(24)
    fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
    grid = grid_of(target, fmt)
    scale, zero = (t.T.expand_as(target) for t in (grid.scale, grid.zero))
    h = damped((x.T @ x).double())
    curvature = factorize((x.T @ x).double())
    order = curvature.order
    code = round_with_error_feedback(target.T, grid, curvature.order, curvature.inverse_factor()).T
    costs = [cost(target, (code - zero).unsqueeze(1), scale[:, :1], h)]
    for _ in range(20):
        code = coordinate_descent_sweep(code.T, grid, target.T, h.float(), order).T
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
    unrelated = moments_of(weight, torch.eye(32), torch.zeros(32, 6))
    (result,) = rounded_layers(unrelated, [6], fmt)
    scale = result.scale.float().repeat_interleave(16, dim=-1)
    zero = 0 if sym else result.zero.repeat_interleave(16, dim=-1)
    wanted = ((weight / scale).round() + zero).clamp(*fmt.code_range)
    assert torch.equal(result.codes.float(), wanted)
    nearest = quantize_weight(weight, fmt).dequantize()
    assert (result.dequantize() - weight).norm() < 0.9 * (nearest - weight).norm()


def test_inputs_that_are_never_active_are_no_trouble() -> None:
    weight, x, error = layer(16)
    fmt = WeightFormat(bits=2, group_size=None, sym=False, dtype=torch.float32)
    used = moments_of(weight, x * (torch.arange(16) < 8), error, 1.0)
    (result,) = rounded_layers(used, [6], fmt)
    assert result.dequantize().isfinite().all()


def test_every_rounded_linear_is_solved_once_in_computing_order(family, tiny) -> None:
    decoder = TransformersDecoder(tiny(family))
    layout = decoder.layout(0)
    groups = layer_groups(layout)
    names = [name for group in groups for name in group.weights]
    assert sorted(names) == sorted(n for n in layout.linears if ".experts." not in n)
    assert "self_attn.o_proj.weight" in groups[1].weights
    aims = [group.stream_module for group in groups[1::2]]
    if family.startswith("gemma"):
        assert aims == [None, None]
    else:
        assert aims == ["input_layernorm", "post_attention_layernorm"][: len(aims)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # without and with norms behind the layers
def test_tokens_count_alike_for_layers_that_aim_at_their_own_output(
    name, tiny, tokens, monkeypatch
) -> None:
    model, seen = tiny(name), []

    def keep(*words, **more):
        seen.append(moments.collect_moments(*words, **more))
        return seen[-1]

    monkeypatch.setattr(block_rounding, "collect_moments", keep)
    config = settings(wbits=8, group_size=None, nsamples=4, seqlen=12)
    decoder = TransformersDecoder(model)
    calibrate(decoder, tokens, [], fresh_learnables(decoder, config, torch.float32), config)

    # With 8 bits, what layers read in both models is nearly the same.
    block, read = decoder.blocks[0], {}
    parts = block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj
    for part in parts:
        part.register_forward_pre_hook(lambda part, words: read.update({part: words[0]}))
    run_blocks(decoder, [0], decoder.block_inputs(tokens), 4)
    for part, moment in zip(parts, seen[:4], strict=True):
        x = read[part]
        if name != "llama" or part in (parts[0], parts[2]):
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
        x = x.flatten(0, 1).double()
        assert (moment.second - x.T @ x).norm() < 0.03 * (x.T @ x).norm()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_a_token_of_any_size_is_counted_or_nothing(size) -> None:
    tokens = size * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scaled = tokens * moments.inverse_size(tokens)
    assert scaled.isfinite().all()
    if size > 1:
        expected = math.sqrt(8) * tokens / tokens.double().norm(dim=-1, keepdim=True)
        torch.testing.assert_close(scaled.double(), expected, rtol=1e-5, atol=0)
    else:
        assert scaled.abs().max() < 1e-6


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


def test_a_block_costs_less_than_three_forward_passes(decoder, samples, monkeypatch) -> None:
    passes = []

    def counted(*words):
        with FlopCounterMode(display=False) as counter:
            result = run_inside(*words)
        passes.append(counter.get_total_flops())
        return result

    for module in (moments, block_rounding):
        monkeypatch.setattr(module, "run_inside", counted)
    config = settings()
    calibrate(decoder, samples, [], fresh_learnables(decoder, config, torch.float32), config)
    with FlopCounterMode(display=False) as once:
        run_blocks(decoder, range(decoder.depth), decoder.block_inputs(samples), 16)
    assert 2 < sum(passes) / once.get_total_flops() < 3


def test_layers_aim_at_the_full_precision_output_from_rounded_inputs(
    decoder, samples, monkeypatch
) -> None:
    """With 8-bit weights and 4-bit activations, the error left is that of ridge regression."""
    monkeypatch.setattr(HeldOutScore, "strength", lambda _: torch.tensor(1.0))
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
