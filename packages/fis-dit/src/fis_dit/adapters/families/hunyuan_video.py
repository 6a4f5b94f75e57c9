"""HunyuanVideo 1.5."""

from collections.abc import Mapping
from typing import Any

from fis_dit.adapters.geometry import Geometry, first_argument, video_geometry
from fis_dit.adapters.layout import JOINT_ATTENTION_ARGUMENTS, FISAdapter, PerToken
from fis_dit.method.cost import BlockShape

TEXT_TOKENS = 1985  # 1000 of the prompt, 256 of glyphs, 729 of the image


def _read_geometry(
    config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Geometry:
    space = config["patch_size"]
    return video_geometry((config["patch_size_t"], space, space), first_argument(args, kwargs))


def _read_block_shape(config: Mapping[str, Any]) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    ffn = int(width * config["mlp_ratio"])
    return BlockShape(kind="joint", width=width, ffn=ffn, text=TEXT_TOKENS)


HUNYUAN_VIDEO_15 = FISAdapter(
    blocks="transformer_blocks",
    probe="x_embedder",
    geometry=_read_geometry,
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "attention_mask",
        "freqs_cis",
    ),
    per_token={"freqs_cis": PerToken(dim=0)},
    attention="attn",
    attention_arguments=JOINT_ATTENTION_ARGUMENTS,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_read_block_shape,
    compression=(4, 16),
    patch=lambda config: (config["patch_size_t"], config["patch_size"]),
    trims_text=True,
)
