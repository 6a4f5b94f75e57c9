"""The built-in adapters: Wan, HunyuanVideo 1.5, CogVideoX, LTX-Video, Mochi.

Facts of diffusers 0.42: argument order and layout of each class's blocks. All of them lay video tokens
out frame by frame.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fis_dit.adapters.table import FISAdapter, Geometry, PerToken, register_adapter
from fis_dit.cost import BlockShape
from fis_dit.errors import HookStateError

Config = Mapping[str, Any]
_WAN_TEXT, _HUNYUAN_TEXT, _LTX_TEXT = 512, 1985, 128


def _five_dimensions(patch: tuple[int, int, int], video: Tensor, frame_dim: int = 2) -> Geometry:
    p_t, p_h, p_w = patch
    frames, height, width = video.shape[frame_dim], video.shape[-2], video.shape[-1]
    return -(-frames // p_t), height // p_h, width // p_w


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _wan_geometry(config: Config, args: tuple[Any, ...], kwargs: Config) -> Geometry:
    return _five_dimensions(tuple(config["patch_size"]), _first(args, kwargs))


def _wan_shape(config: Config) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="cross", width=width, ffn=config["ffn_dim"], text=_WAN_TEXT)


def _wan_attention_input(block: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What WanTransformerBlock feeds its self-attention, for all frames, on the block's device."""
    table = block.scale_shift_table
    hidden, temb = (arguments[name].to(table.device) for name in ("hidden_states", "temb"))
    per_token = temb.ndim == 4
    shift, scale = ((table.unsqueeze(0) if per_token else table) + temb.float()).chunk(6, dim=-2)[
        :2
    ]
    if per_token:
        shift, scale = shift.squeeze(2), scale.squeeze(2)
    return (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)


WAN = FISAdapter(
    blocks="blocks",
    probe="patch_embedding",
    geometry=_wan_geometry,
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
    shape=_wan_shape,
    patch=lambda config: (config["patch_size"][0], config["patch_size"][1]),
    attention_input=_wan_attention_input,
)


def _hunyuan_geometry(config: Config, args: tuple[Any, ...], kwargs: Config) -> Geometry:
    space = config["patch_size"]
    return _five_dimensions((config["patch_size_t"], space, space), _first(args, kwargs))


def _hunyuan_shape(config: Config) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    ffn = int(width * config["mlp_ratio"])
    return BlockShape(kind="joint", width=width, ffn=ffn, text=_HUNYUAN_TEXT)


_JOINT_ATTENTION = ("hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb")

HUNYUAN_15 = FISAdapter(
    blocks="transformer_blocks",
    probe="x_embedder",
    geometry=_hunyuan_geometry,
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "attention_mask",
        "freqs_cis",
    ),
    per_token={"freqs_cis": PerToken(dim=0)},
    attention="attn",
    attention_arguments=_JOINT_ATTENTION,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_hunyuan_shape,
    compression=(4, 16),
    patch=lambda config: (config["patch_size_t"], config["patch_size"]),
    trims_text=True,
)


def _cog_geometry(config: Config, args: tuple[Any, ...], kwargs: Config) -> Geometry:
    video = kwargs["image_embeds"] if "image_embeds" in kwargs else args[1]  # b f c h w
    space = config["patch_size"]
    return _five_dimensions((config["patch_size_t"] or 1, space, space), video, frame_dim=1)


def _cog_shape(config: Config) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="joint", width=width, ffn=4 * width, text=config["max_text_seq_length"])


COGVIDEOX = FISAdapter(
    blocks="transformer_blocks",
    probe="patch_embed",
    geometry=_cog_geometry,
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "image_rotary_emb",
        "attention_kwargs",
    ),
    per_token={"image_rotary_emb": PerToken(dim=0)},
    attention="attn1",
    attention_arguments=_JOINT_ATTENTION,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_cog_shape,
    patch=lambda config: (config["patch_size_t"] or 1, config["patch_size"]),
)


def _named_geometry(names: tuple[str, ...]) -> Any:
    """For probes that are told frames, height and width in tokens; ``names`` of all arguments."""

    def read(config: Config, args: tuple[Any, ...], kwargs: Config) -> Geometry:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = [given.get(name) for name in ("num_frames", "height", "width")]
        if any(value is None for value in found):
            raise HookStateError(
                "this pipeline gives the transformer no num_frames, height and width; use one that "
                "does, or describe the layout with fis_dit.register_adapter"
            )
        return int(found[0]), int(found[1]), int(found[2])  # pyright: ignore[reportArgumentType]

    return read


def _ltx_shape(config: Config) -> BlockShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="cross", width=width, ffn=4 * width, text=_LTX_TEXT)


LTX = FISAdapter(
    blocks="transformer_blocks",
    probe="rope",
    geometry=_named_geometry(("hidden_states", "num_frames", "height", "width")),
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
    attention_arguments=_JOINT_ATTENTION,
    attention_per_token={"image_rotary_emb": PerToken(dim=1)},
    shape=_ltx_shape,
    compression=(8, 32),
    patch=lambda config: (config["patch_size_t"], config["patch_size"]),
)


def _mochi_shape(config: Config) -> BlockShape:
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
    geometry=_named_geometry(("pos_frequencies", "num_frames", "height", "width")),
    block_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "encoder_attention_mask",
        "image_rotary_emb",
    ),
    per_token={"image_rotary_emb": PerToken(dim=0)},
    attention="attn1",
    attention_arguments=_JOINT_ATTENTION,
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=_mochi_shape,
    compression=(6, 8),
    patch=lambda config: (1, config["patch_size"]),
)

for _name, _adapter in {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_15,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "LTXVideoTransformer3DModel": LTX,
    "MochiTransformer3DModel": MOCHI,
}.items():
    register_adapter(_name, _adapter)
