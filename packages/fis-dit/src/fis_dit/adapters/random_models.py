"""Transformers of released shapes with random weights, and the arguments of one forward.

Speed and memory do not depend on the weights, so that these stand in for models that are not at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fis_dit.adapters.model_configs import with_defaults
from fis_dit.adapters.registry import find_adapter
from fis_dit.method.cost import BlockShape

TINY_TEXT_WIDTH, TINY_TEXT_TOKENS = 64, 8  # of the architecture "tiny"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes of a released model (or of a small stand-in) and of its clip.

    Attributes:
        model: Transformer class.
        settings: Its arguments, where they differ from the defaults.
        latent: (channels, frames, height, width) of the latent.
        geometry: Frames and tokens per frame.
        parameters: In billions.
        dense_ends: Dense blocks at each end.
    """

    model: str
    settings: dict[str, Any]
    latent: tuple[int, int, int, int]
    geometry: tuple[int, int]
    parameters: float
    dense_ends: int


ARCHITECTURES = {
    "tiny": Architecture(
        model="WanTransformer3DModel",
        settings={
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "ffn_dim": 1024,
            "num_layers": 4,
            "text_dim": 64,
        },
        latent=(16, 21, 28, 28),
        geometry=(21, 196),
        parameters=0.005,
        dense_ends=0,
    ),
    "wan-a14b": Architecture(
        model="WanTransformer3DModel",
        settings={},
        latent=(16, 21, 90, 160),
        geometry=(21, 3600),
        parameters=14.29,
        dense_ends=3,
    ),
    "wan-5b": Architecture(
        model="WanTransformer3DModel",
        settings={
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        latent=(48, 31, 44, 80),
        geometry=(31, 880),
        parameters=5.0,
        dense_ends=2,
    ),
    "hy15": Architecture(
        model="HunyuanVideo15Transformer3DModel",
        settings={"task_type": "t2v"},
        latent=(65, 31, 45, 80),
        geometry=(31, 3600),
        parameters=8.33,
        dense_ends=4,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the FLOPs model and the settings must know of an architecture's blocks.

    Attributes:
        shape: Of every block.
        depth: Number of blocks.
        trims_text: Whether padded text can be left out.
    """

    shape: BlockShape
    depth: int
    trims_text: bool


def describe_blocks(architecture: Architecture) -> Blocks:
    """Describe the blocks of an architecture, without building it."""
    values = with_defaults(architecture.model, architecture.settings)
    adapter = find_adapter(architecture.model)
    return Blocks(
        shape=adapter.shape(values), depth=values["num_layers"], trims_text=adapter.trims_text
    )


def build_random_model(
    architecture: Architecture, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, Any]]:
    """Build a model with random weights, and the arguments of one forward.

    Args:
        architecture: Its shapes.
        device: Of both.
        dtype: As in ``make_random_transformer``; default bfloat16, on the CPU float32.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model = make_random_transformer(architecture, dtype)
    return model, make_forward_inputs(
        architecture, model, lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    )


def make_random_transformer(architecture: Architecture, dtype: torch.dtype) -> Any:
    """Make a transformer with random weights on torch's default device, frozen.

    Args:
        architecture: Its shapes.
        dtype: Of the weights, save those that diffusers keeps in float32.
    """
    import diffusers

    # Built in its final type, as diffusers loads it: in float32 A14B would need 57 GB on the way.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = getattr(diffusers, architecture.model)(**architecture.settings)
    finally:
        torch.set_default_dtype(default)
    float32_names = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(part in name for part in float32_names):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def make_forward_inputs(
    architecture: Architecture, model: Any, noise: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    """Make the arguments of one forward, of one sample.

    Args:
        architecture: Of the model.
        model: The transformer.
        noise: Makes a tensor of a shape; the others follow its device and type.
    """
    # What all families take.
    hidden = noise(1, *architecture.latent)
    device, dtype = hidden.device, hidden.dtype
    inputs: dict[str, Any] = {
        "hidden_states": hidden,
        "timestep": torch.full((1,), 500.0, device=device),
        "return_dict": False,
    }

    # Text, as long as the pipelines pad it.
    if architecture.model == "HunyuanVideo15Transformer3DModel":
        inputs |= {
            "timestep": inputs["timestep"].to(dtype),
            "encoder_hidden_states": noise(1, 1000, 3584),
            "encoder_attention_mask": torch.ones(1, 1000, dtype=torch.long, device=device),
            "encoder_hidden_states_2": noise(1, 256, 1472),
            "encoder_attention_mask_2": torch.ones(1, 256, dtype=torch.long, device=device),
            "image_embeds": torch.zeros(1, 729, 1152, device=device, dtype=dtype),
        }
    else:
        width = model.config.text_dim
        text_tokens = TINY_TEXT_TOKENS if width == TINY_TEXT_WIDTH else 512
        inputs["encoder_hidden_states"] = noise(1, text_tokens, width)

    # TI2V-5B takes a time step for every token.
    if architecture.model == "WanTransformer3DModel" and architecture.latent[0] == 48:
        total = architecture.geometry[0] * architecture.geometry[1]
        inputs["timestep"] = inputs["timestep"].expand(1, total).contiguous()
    return inputs
