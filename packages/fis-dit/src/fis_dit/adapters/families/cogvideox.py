"""CogVideoX and CogVideoX 1.5, whose patches span two latent frames."""

from collections.abc import Mapping
from typing import Any

from fis_dit.adapters.geometry import Geometry, video_geometry
from fis_dit.adapters.layout import JOINT_ATTENTION_ARGUMENTS, FISAdapter, PerToken
from fis_dit.method.cost import BlockShape


def _read_geometry(
    config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Geometry:
    video = kwargs["image_embeds"] if "image_embeds" in kwargs else args[1]  # b f c h w
    space = config["patch_size"]
    return video_geometry((config["patch_size_t"] or 1, space, space), video, frame_dim=1)


def _read_block_shape(config: Mapping[str, Any]) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="joint", width=width, ffn=4 * width, text=config["max_text_seq_length"])


COGVIDEOX = FISAdapter(
    blocks="transformer_blocks",
    probe="patch_embed",
    geometry=_read_geometry,
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "image_rotary_emb",
        "attention_kwargs",
    ),
    per_token={"image_rotary_emb": PerToken(dim=0)},
    attention="attn1",
    attention_arguments=JOINT_ATTENTION_ARGUMENTS,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_read_block_shape,
    patch=lambda config: (config["patch_size_t"] or 1, config["patch_size"]),
)
