"""Wan 2.1 and 2.2: A14B with two transformers, TI2V-5B, image-to-video, VACE."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fis_dit.adapters.geometry import Geometry, first_argument, video_geometry
from fis_dit.adapters.layout import FISAdapter, PerToken
from fis_dit.method.cost import BlockShape

TEXT_TOKENS = 512


def _read_geometry(
    config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Geometry:
    return video_geometry(tuple(config["patch_size"]), first_argument(args, kwargs))


def _read_block_shape(config: Mapping[str, Any]) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="cross", width=width, ffn=config["ffn_dim"], text=TEXT_TOKENS)


def _compute_attention_input(block: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Compute what WanTransformerBlock feeds its self-attention: all frames, on the block's device."""
    table = block.scale_shift_table
    hidden, temb = (arguments[name].to(table.device) for name in ("hidden_states", "temb"))

    # TI2V-5B has one modulation per token; the others have one per sample.
    per_token = temb.ndim == 4
    modulation = (table.unsqueeze(0) if per_token else table) + temb.float()
    shift, scale, *_ = modulation.chunk(6, dim=-2)
    if per_token:
        shift, scale = shift.squeeze(2), scale.squeeze(2)

    return (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)


WAN = FISAdapter(
    blocks="blocks",
    probe="patch_embedding",
    geometry=_read_geometry,
    block_arguments=("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
    # 4 dimensions: one modulation per token, as in TI2V-5B.
    per_token={"rotary_emb": PerToken(dim=1), "temb": PerToken(dim=1, ndim=4)},
    attention="attn1",
    attention_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "rotary_emb",
    ),
    attention_per_token={"rotary_emb": PerToken(dim=1)},
    shape=_read_block_shape,
    patch=lambda config: (config["patch_size"][0], config["patch_size"][1]),
    attention_input=_compute_attention_input,
)
