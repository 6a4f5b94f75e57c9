"""The FLOPs model against torch's counter, and against figures worked out for full-size models."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effml_common.errors import ConfigError
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.method.cost import BlockShape, choose_blocks, count_anchors, flops

WAN_A14B = BlockShape(kind="cross", width=5120, ffn=13824, text=512)
WAN_5B = BlockShape(kind="cross", width=3072, ffn=14336, text=512)
HUNYUAN = BlockShape(kind="joint", width=2048, ffn=8192, text=1985)


FRAMES, TOKENS = 7, 4  # of the tiny models
# Mochi asks for float32 autocast, which the CPU lacks.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def counted_in_blocks(family) -> float:
    """FLOPs inside the blocks, modulation left out: it is one small product per sample."""
    adapter = find_adapter(family.model)
    prefix = f"{type(family.model).__name__}.{adapter.blocks}."
    with FlopCounterMode(display=False, depth=9) as counter:
        family()
    counts = counter.get_flop_counts()
    inside = {
        name: sum(ops.values())
        for name, ops in counts.items()
        if name.startswith(prefix) and name.count(".") == 2
    }
    modulation = sum(
        sum(ops.values())
        for name, ops in counts.items()
        if (name.startswith(prefix) and name.endswith(".linear") and ".norm1" in name)
        or (name.startswith(prefix) and name.endswith((".norm1.linear", ".norm2.linear")))
        or (name.startswith(prefix) and name.endswith("norm1_context.linear_1"))
    )
    return sum(inside.values()) - modulation


@pytest.mark.parametrize("name", ["wan", "hunyuan-1.5", "cogvideox", "ltx", "mochi"])
@pytest.mark.parametrize("sites", ["block", "attn"])
def test_the_model_agrees_with_torchs_counter_within_one_percent(
    tiny, name: str, sites: str
) -> None:
    family = tiny(name)
    text = 10 if name == "hunyuan-1.5" else 5
    shape = dataclasses.replace(find_adapter(family.model).shape(family.model.config), text=text)
    config = FISConfig(stride=2, dense_head=1, dense_tail=1, sites=sites)
    cost = flops(shape, config, 4, FRAMES, TOKENS)
    dense = counted_in_blocks(family)
    with apply_fis(family.model, config):
        sparse = counted_in_blocks(family)
    tolerance = 0.05 if name == "mochi" else 0.01  # Mochi's last block leaves the text stream out
    assert cost.dense == pytest.approx(dense, rel=tolerance)
    assert cost.sparse == pytest.approx(sparse, rel=tolerance)


def test_full_keys_cost_what_torch_counts(tiny_wan) -> None:
    family = tiny_wan
    shape = dataclasses.replace(find_adapter(family.model).shape(family.model.config), text=5)
    config = FISConfig(dense_head=1, dense_tail=1, kv="full")
    with apply_fis(family.model, config):
        counted = counted_in_blocks(family)
    assert flops(shape, config, 4, FRAMES, TOKENS).sparse == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "frames", "tokens", "depth", "settings", "want"),
    [
        (WAN_A14B, 21, 3600, 40, {"dense_head": 3, "dense_tail": 3}, 2.15),
        (WAN_A14B, 21, 3600, 40, {"dense_head": 3, "dense_tail": 0}, 2.40),
        (WAN_A14B, 21, 3600, 40, {"dense_head": 3, "dense_tail": 3, "sites": "attn"}, 1.87),
        (WAN_A14B, 21, 3600, 40, {"dense_head": 3, "dense_tail": 3, "stride": 3}, 2.93),
        (WAN_A14B, 21, 3600, 40, {"dense_head": 0, "dense_tail": 0, "kv": "full"}, 1.76),
        (WAN_5B, 31, 880, 30, {"dense_head": 2, "dense_tail": 2}, 2.08),
        (HUNYUAN, 31, 3600, 54, {"dense_head": 4, "dense_tail": 4}, 2.39),
        (HUNYUAN, 31, 3600, 54, {"dense_head": 0, "dense_tail": 0, "kv": "full"}, 1.83),
    ],
)
def test_full_size_models_have_the_known_speed_ups(
    shape, frames, tokens, depth, settings, want
) -> None:
    got = flops(shape, FISConfig(**settings), depth, frames, tokens).speedup
    assert got == pytest.approx(want, abs=0.011)


def test_a_dense_step_costs_a_dense_step() -> None:
    config = FISConfig(dense_head=3, dense_tail=3)
    one = flops(WAN_A14B, config, 40, 21, 3600, steps=1)
    run = flops(WAN_A14B, dataclasses.replace(config, dense_steps=(-1,)), 40, 21, 3600, steps=4)
    assert run.sparse == pytest.approx(3 * one.sparse + one.dense)


def test_the_static_pattern_has_one_phase() -> None:
    assert count_anchors(FISConfig(pattern="static"), 21) == (11,)


def test_the_fewest_blocks_of_lowest_score_reach_the_target() -> None:
    scores = [9.0, 1.0, 2.0, 3.0, 4.0, 8.0]
    chosen = choose_blocks(1.5, WAN_A14B, FISConfig(), scores, 21, 3600)
    assert chosen == (1, 2, 3, 4)
    fewer = FISConfig(blocks=(1, 2, 3))
    assert flops(WAN_A14B, fewer, 6, 21, 3600).speedup < 1.5
    with pytest.raises(ConfigError, match="raise the stride"):
        choose_blocks(9, WAN_A14B, FISConfig(), scores, 21, 3600)


def test_counting_needs_no_weights(tiny) -> None:
    with torch.device("meta"):
        assert counted_in_blocks(tiny("wan", depth=2)) > 0
