"""Patterns of the settings against the names of a model, and what they make of it."""

import pytest
import torch

from effml_common.errors import ConfigError
from sliderquant.adapters.layer_bits import (
    block_formats,
    check_servable,
    describe_bits,
    fits,
    layer_bits,
    mean_bits_per_weight,
)
from sliderquant.config import InspectConfig, SliderConfig
from sliderquant.method.layout import LayerGroup

Q, K, DOWN = "self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight"
EXPERTS = "mlp.experts.gate_up_proj"
BLOCKS = [(Q, K, DOWN)] * 12


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1.mlp.down_proj", "layers.1.mlp.down_proj", True),
        ("layers.1.*", "layers.1.self_attn.q_proj", True),
        ("layers.1.*", "layers.11.self_attn.q_proj", False),
        ("layers.1?.*", "layers.11.self_attn.q_proj", True),
        ("layers.[01].*", "layers.1.self_attn.q_proj", True),
        ("mlp.down_proj", "layers.7.mlp.down_proj", True),
        ("*.down_proj", "layers.7.mlp.down_proj", True),
        ("down_proj", "layers.7.mlp.down_proj", True),
        ("own_proj", "layers.7.mlp.down_proj", False),  # an end begins behind a dot
        ("mlp", "layers.7.mlp.down_proj", False),  # an end reaches to the end
        ("Down_proj", "layers.7.mlp.down_proj", False),
        ("model.layers.7.mlp.down_proj.weight", "layers.7.mlp.down_proj", True),
        ("*", "layers.7.mlp.down_proj", True),
    ],
)
def test_a_pattern_fits_a_name_or_its_end_behind_a_dot(pattern, name, expected) -> None:
    assert fits(pattern, name) is expected


def test_the_last_pattern_counts_and_ignoring_wins() -> None:
    config = SliderConfig(
        wbits=3, bits_for=("layers.0.*=8", "q_proj=4", "layers.2.*=16"), ignore=("layers.0.mlp.*",)
    )
    bits = layer_bits(config, BLOCKS)
    assert bits[0] == {Q: 4, K: 8, DOWN: 16}
    assert bits[1] == {Q: 4, K: 3, DOWN: 3}
    assert bits[2] == {Q: 16, K: 16, DOWN: 16}


def test_without_patterns_all_layers_have_the_same_bits() -> None:
    assert layer_bits(SliderConfig(wbits=5), BLOCKS) == [dict.fromkeys(BLOCKS[0], 5)] * 12


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ignore": ("lm_head",)}, "lm_head is never rounded; leave it out"),
        ({"bits_for": ("model.lm_head.weight=8",)}, "lm_head is never rounded; leave it out"),
        ({"ignore": ("down_prj",)}, "ignore has 'down_prj', which fits no layer; use .* down_proj"),
        (
            {"bits_for": ("layers.5=8",)},
            r"bits_for has 'layers.5', .* use names such as layers.5.\*",
        ),
        ({"ignore": ("????",)}, "use names such as q_proj, k_proj, down_proj"),
    ],
)
def test_patterns_that_fit_nothing_are_refused_with_the_nearest_names(settings, words) -> None:
    with pytest.raises(ConfigError, match=words):
        layer_bits(SliderConfig(**settings), BLOCKS)


@pytest.mark.parametrize("entry", ["down_proj", "down_proj=1", "down_proj=9", "=8", "q=x", "q=08"])
def test_entries_without_bits_are_refused_before_a_model_is_read(entry) -> None:
    with pytest.raises(ConfigError, match="give PATTERN=BITS"):
        SliderConfig(bits_for=(entry,))


def test_settings_that_leave_nothing_to_do_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty pattern"):
        SliderConfig(ignore=("",))
    with pytest.raises(ConfigError, match="set wbits or bits_for"):
        SliderConfig(wbits=16, method="slider", ignore=("q_proj",))
    with pytest.raises(ConfigError, match="give --model DIR"):
        InspectConfig(layers=4, ignore=("q_proj",))


def test_experts_that_are_left_out_cannot_read_exact_activations() -> None:
    config = SliderConfig(method="slider", ignore=("experts.*",), abits=8)
    with pytest.raises(ConfigError, match="set abits to 16"):
        layer_bits(config, [(Q, EXPERTS)])
    # Without patterns the weights of all experts may stay as they are.
    plain = SliderConfig(method="slider", wbits=16, abits=8)
    assert layer_bits(plain, [(Q, EXPERTS)]) == [{Q: 16, EXPERTS: 16}]


def test_mean_bits_count_scales_zero_points_and_what_is_left_out() -> None:
    config = SliderConfig(wbits=4, group_size=8, sym=False, ignore=("down_proj",))
    (bits,) = layer_bits(config, [(Q, DOWN)])
    formats = block_formats(config, bits, torch.bfloat16)
    shapes = {Q: (16, 16), DOWN: (16, 48)}
    # 256 weights of 4 bits with 16 + 4 bits for 8 of them, and 768 of 16 bits.
    expected = (256 * (4 + 20 / 8) + 768 * 16) / 1024
    assert mean_bits_per_weight([shapes], [formats], torch.bfloat16) == expected


def test_description_names_what_differs_from_most_layers() -> None:
    config = SliderConfig(bits_for=("layers.[0-2].*=8",), ignore=("layers.7.*", "layers.1?.mlp.*"))
    assert describe_bits(layer_bits(config, BLOCKS)) == (
        "22 layers in 4 bits; 9 in 8 bits (layers.0-2.*); "
        "5 not rounded (layers.7.*, layers.10-11.mlp.down_proj)"
    )


def test_servers_are_warned_of_where_fused_layers_differ(capsys) -> None:
    groups = [[LayerGroup((Q, K), None), LayerGroup((DOWN,), None)]] * 12
    check_servable(
        layer_bits(SliderConfig(bits_for=("layers.3.*=8", "down_proj=2")), BLOCKS), groups
    )
    assert capsys.readouterr().err == ""
    check_servable(layer_bits(SliderConfig(ignore=("layers.[34].*q_proj",)), BLOCKS), groups)
    (line,) = capsys.readouterr().err.splitlines()
    assert "self_attn.q_proj, self_attn.k_proj of layers 3-4; " in line
    assert "vLLM needs one format" in line
