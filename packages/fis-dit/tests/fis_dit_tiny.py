"""Tiny random models of every supported class, and a video with the other inputs for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = 7, 4, 4  # of the latent


TOKENS = 4  # per frame, in every tiny model


@dataclass(frozen=True)
class Family:
    """A tiny model with its inputs: ``inputs(batch)`` are the forward's arguments."""

    model: nn.Module
    inputs: Callable[..., dict[str, Any]]
    depth: int

    def __call__(self, batch: int = 1, frames: int = FRAMES, **changes: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**{**self.inputs(batch, frames), **changes}, return_dict=False)[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter, so that gates and biases that start at zero or one matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wan(depth: int = 4, **changes: Any) -> Family:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "ffn_dim": 32}
    sizes |= {"out_channels": 4, "text_dim": 8, "freq_dim": 16, "num_layers": depth}
    sizes |= {"rope_max_seq_len": 32}
    model = shake(WanTransformer3DModel(**{**sizes, **changes}))

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 4, frames, HEIGHT, WIDTH),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 5, 8, seed=1),
        }

    return Family(model, inputs, depth)


def wan_per_token(depth: int = 4) -> Family:
    """TI2V-5B: a time step per token, 0 for the given first frame."""
    family = wan(depth)

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        time = torch.full((batch, frames * TOKENS), 500.0)
        time[:, :TOKENS] = 0
        return {**family.inputs(batch, frames), "timestep": time}

    return Family(family.model, inputs, depth)


def wan_vace(depth: int = 4) -> Family:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "ffn_dim": 32}
    sizes |= {"out_channels": 4, "text_dim": 8, "freq_dim": 16, "num_layers": depth}
    sizes |= {"rope_max_seq_len": 32, "vace_layers": [0, 2], "vace_in_channels": 6}
    model = shake(WanVACETransformer3DModel(**sizes))
    plain = wan(depth)

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        control = noise(batch, 6, frames, HEIGHT, WIDTH, seed=2)
        return {**plain.inputs(batch, frames), "control_hidden_states": control}

    return Family(model, inputs, depth)


def hunyuan(depth: int = 4) -> Family:
    torch.manual_seed(0)
    model = shake(
        HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=depth,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=2,
            text_embed_dim=8,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
            target_size=16,
        )
    )

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        mask = torch.tensor([1, 1, 1, 0, 0]).expand(batch, -1)  # padded text
        return {
            "hidden_states": noise(batch, 4, frames, HEIGHT, WIDTH),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 5, 8, seed=1),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": noise(batch, 3, 8, seed=2),
            "encoder_attention_mask_2": torch.tensor([1, 1, 0]).expand(batch, -1),
            "image_embeds": torch.zeros(batch, 2, 8),
        }

    return Family(model, inputs, depth)


def cogvideox(depth: int = 4, patch_size_t: int | None = None) -> Family:
    torch.manual_seed(0)
    model = shake(
        CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=8,
            num_layers=depth,
            sample_width=WIDTH,
            sample_height=HEIGHT,
            sample_frames=25,
            patch_size=2,
            patch_size_t=patch_size_t,
            max_text_seq_length=5,
            use_rotary_positional_embeddings=True,
        )
    )

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        tokens = frames * TOKENS
        return {
            "hidden_states": noise(batch, frames * (patch_size_t or 1), 4, HEIGHT, WIDTH),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 5, 8, seed=1),
            "image_rotary_emb": (noise(tokens, 16, seed=3), noise(tokens, 16, seed=4)),
        }

    return Family(model, inputs, depth)


def ltx(depth: int = 4) -> Family:
    torch.manual_seed(0)
    model = shake(
        LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=depth,
            caption_channels=8,
        )
    )

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, frames * TOKENS, 4),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 5, 8, seed=1),
            "encoder_attention_mask": torch.tensor([1, 1, 1, 1, 0]).expand(batch, -1),
            "num_frames": frames,
            "height": 2,
            "width": 2,
        }

    return Family(model, inputs, depth)


def mochi(depth: int = 4) -> Family:
    torch.manual_seed(0)
    model = shake(
        MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=depth,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=8,
            time_embed_dim=8,
            max_sequence_length=5,
        )
    )

    def inputs(batch: int, frames: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(batch, 4, frames, HEIGHT, WIDTH),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, 5, 8, seed=1),
            "encoder_attention_mask": torch.tensor([1, 1, 1, 1, 0]).expand(batch, -1).bool(),
        }

    return Family(model, inputs, depth)


FAMILIES: dict[str, Callable[..., Family]] = {
    "wan": wan,
    "wan-per-token": wan_per_token,
    "wan-vace": wan_vace,
    "hunyuan-1.5": hunyuan,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda depth=4: cogvideox(depth, patch_size_t=2),
    "ltx": ltx,
    "mochi": mochi,
}
