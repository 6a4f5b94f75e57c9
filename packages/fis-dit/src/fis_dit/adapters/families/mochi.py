"""Mochi 1."""

from collections.abc import Mapping
from typing import Any

from fis_dit.adapters.geometry import geometry_from_arguments
from fis_dit.adapters.layout import JOINT_ATTENTION_ARGUMENTS, FISAdapter, PerToken
from fis_dit.method.cost import BlockShape


def _read_block_shape(config: Mapping[str, Any]) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text_width = config["pooled_projection_dim"]
    return BlockShape(
        kind="joint",
        width=width,
        ffn=4 * width * 2 // 3,
        ffn_matrices=3,
        text=config["max_sequence_length"],
        text_width=text_width,
        text_ffn=4 * text_width * 2 // 3,
    )


MOCHI = FISAdapter(
    blocks="transformer_blocks",
    probe="rope",  # patch_embed sees frames as a batch
    geometry=geometry_from_arguments(("pos_frequencies", "num_frames", "height", "width")),
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "encoder_attention_mask",
        "image_rotary_emb",
    ),
    per_token={"image_rotary_emb": PerToken(dim=0)},
    attention="attn1",
    attention_arguments=JOINT_ATTENTION_ARGUMENTS,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_read_block_shape,
    compression=(6, 8),
    patch=lambda config: (1, config["patch_size"]),
)
