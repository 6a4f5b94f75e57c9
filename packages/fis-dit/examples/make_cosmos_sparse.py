"""Describe a transformer class that fis-dit does not know, Cosmos of diffusers, and make it sparse.

    python make_cosmos_sparse.py models/Cosmos-Predict2-2B/transformer [FRAMES HEIGHT WIDTH]

The script runs one forward on noise, dense and sparse, and prints how far apart the outputs are. The
sizes are those of the latent. The quality of clips of Cosmos was not measured.
"""

import sys

import torch
from diffusers import CosmosTransformer3DModel

from fis_dit import FISAdapter, FISConfig, apply_fis, register_adapter
from fis_dit.adapters.geometry import video_geometry
from fis_dit.adapters.layout import PerToken
from fis_dit.method.cost import BlockShape


def block_shape(config):  # what a block costs depends on
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return BlockShape(kind="cross", width=width, ffn=int(config["mlp_ratio"] * width), text=512)


tokens = PerToken(dim=1, ndim=3)  # gathered only where there is an entry for each token
adapter = FISAdapter(
    blocks="transformer_blocks",
    probe="patch_embed",  # runs once per forward, and sees the latent "b c f h w"
    geometry=lambda config, args, kwargs: video_geometry(tuple(config["patch_size"]), args[0]),
    block_arguments=(
        *("hidden_states", "encoder_hidden_states", "embedded_timestep", "temb"),
        *("image_rotary_emb", "extra_pos_emb", "attention_mask", "controlnet_residual"),
    ),
    per_token={"embedded_timestep": tokens, "temb": tokens, "extra_pos_emb": tokens}
    | {"image_rotary_emb": PerToken(dim=0), "controlnet_residual": tokens},
    attention="attn1",
    attention_arguments=("hidden_states", "encoder_hidden_states", "attention_mask"),
    attention_per_token={"image_rotary_emb": PerToken(dim=0)},
    shape=block_shape,
    patch=lambda config: tuple(config["patch_size"][:2]),
)
register_adapter(CosmosTransformer3DModel, adapter)

model = sys.argv[1] if len(sys.argv) > 1 else "models/Cosmos-Predict2-2B/transformer"
frames, height, width = map(int, sys.argv[2:5]) if len(sys.argv) > 4 else (24, 88, 160)
device = "cuda" if torch.cuda.is_available() else "cpu"
transformer = CosmosTransformer3DModel.from_pretrained(model).to(device)
channels, text_width = transformer.config.in_channels, transformer.config.text_embed_dim

latent = torch.randn(1, channels, frames, height, width, device=device)
timestep, text = torch.tensor([0.5], device=device), torch.randn(1, 512, text_width, device=device)
extra = {"padding_mask": torch.zeros(1, 1, height, width, device=device), "fps": 16}
with torch.no_grad():
    dense = transformer(latent, timestep, text, **extra).sample
    with apply_fis(transformer, FISConfig(stride=2)) as handle:
        sparse = transformer(latent, timestep, text, **extra).sample
        summary = handle.summary()["transformer"]
distance = float((sparse - dense).norm() / dense.norm())
print(f"{len(summary['sparse_blocks'])} sparse blocks, {summary['frames']} frames: {distance:.3f}")
