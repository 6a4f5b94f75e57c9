"""Channel scales in closed form, against loops over channels."""

import math

import pytest
import torch

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.method.smoothing import smoothing_factors


def parts(tiny, family):
    """Sites of a block, its rounded weights and squared inputs made up for each of their columns."""
    decoder = TransformersDecoder(tiny(family))
    layout = decoder.layout(0)
    weights = decoder.linear_weights(0)
    generator = torch.Generator().manual_seed(0)
    squares = {n: torch.rand(w.shape[-1], generator=generator) + 0.1 for n, w in weights.items()}
    return {site.name: site for site in layout.sites}, weights, squares


def by_hand(columns, weights, squares):
    """sqrt(rms(x) / rms(w)) of one entry, from the (weight, column) pairs that it scales."""
    x = [float(squares[name][j]) for name, j in columns]
    values = [float(v) for name, j in columns for v in weights[name][:, j]]
    w = [v * v for v in values]
    return math.sqrt(math.sqrt(sum(x) / len(x)) / math.sqrt(sum(w) / len(w)))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_scales_make_inputs_and_weights_of_a_channel_equally_large(tiny, name) -> None:
    sites, weights, squares = parts(tiny, name)
    letters = ["qkv"] if name == "phi3" else ["q", "k", "v"]
    names = [f"self_attn.{each}_proj.weight" for each in letters]
    factors = smoothing_factors(sites["norm -> qkv"], weights, squares)
    wanted = torch.tensor(
        [by_hand([(n, j) for n in names], weights, squares) for j in range(len(factors))]
    )
    torch.testing.assert_close(factors / factors[0], wanted / wanted[0])
    assert factors.log().mean().abs() < 1e-6


def test_heads_that_share_values_share_a_scale(tiny) -> None:
    sites, weights, squares = parts(tiny, "llama")  # 4 heads of 8, 2 of keys and values
    name = "self_attn.o_proj.weight"
    factors = smoothing_factors(sites["v -> o"], weights, squares)
    columns = [[(name, 16 * (j // 8) + j % 8 + 8 * twin) for twin in (0, 1)] for j in range(16)]
    wanted = torch.tensor([by_hand(pair, weights, squares) for pair in columns])
    torch.testing.assert_close(factors / factors[0], wanted / wanted[0])


def test_what_nothing_reads_or_nothing_feeds_stays_as_it_is(tiny) -> None:
    sites, weights, squares = parts(tiny, "llama")
    assert torch.equal(
        smoothing_factors(sites["q <-> k"], weights, squares), torch.ones(sites["q <-> k"].size)
    )
    name = "mlp.down_proj.weight"
    squares[name][3] = 0
    weights[name] = weights[name].clone()
    weights[name][:, 5] = 0
    factors = smoothing_factors(sites["up -> down"], weights, squares)
    assert factors[3] == factors[5] == 1
    assert factors.isfinite().all()
    assert (factors > 0).all()
    squares = {name: torch.zeros_like(peak) for name, peak in squares.items()}
    assert torch.equal(smoothing_factors(sites["up -> down"], weights, squares), torch.ones(48))
