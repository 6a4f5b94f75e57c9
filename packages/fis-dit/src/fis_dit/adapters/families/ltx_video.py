"""LTX-Video."""

from collections.abc import Mapping
from typing import Any

from fis_dit.adapters.geometry import geometry_from_arguments
from fis_dit.adapters.layout import JOINT_ATTENTION_ARGUMENTS, FISAdapter, PerToken
from fis_dit.method.cost import BlockShape

TEXT_TOKENS = 128


def _read_block_shape(config: Mapping[str, Any]) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="cross", width=width, ffn=4 * width, text=TEXT_TOKENS)


LTX_VIDEO = FISAdapter(
    blocks="transformer_blocks",
    probe="rope",
    geometry=geometry_from_arguments(("hidden_states", "num_frames", "height", "width")),
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "image_rotary_emb",
        "encoder_attention_mask",
    ),
    # One modulation per token where frames are conditioned one by one; otherwise one per sample.
    per_token={"image_rotary_emb": PerToken(dim=1), "temb": PerToken(dim=1, ndim=3)},
    attention="attn1",
    attention_arguments=JOINT_ATTENTION_ARGUMENTS,
    attention_per_token={"image_rotary_emb": PerToken(dim=1)},
    shape=_read_block_shape,
    compression=(8, 32),
    patch=lambda config: (config["patch_size_t"], config["patch_size"]),
)
