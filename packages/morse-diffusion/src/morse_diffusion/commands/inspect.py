"""The ``inspect`` command: what a Dot is made of, without loading a weight."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from effml_common.report import Summary
from morse_diffusion.adapters.dot import DotShape, UNetDot
from morse_diffusion.adapters.dot.io import read_config
from morse_diffusion.config import InspectConfig
from morse_diffusion.method.lora import iterate_targets

PUBLISHED_WEIGHTS = {"Dash": 859.52e6, "Dot": 97.84e6}  # Table 2 of the paper, SD v1.4
PUBLISHED_SHAPE = DotShape(m=2, channels=(96, 160), layers=1, lora_rank=64)


def inspect(config: InspectConfig) -> Summary:
    """Describe a Dot on disk, or count the published one.

    Raises:
        DotMismatchError: If the folder holds no Dot.
    """
    if config.dot is not None:
        values = read_config(config.dot)
        return Summary(values, shown={name: str(value) for name, value in values.items()})
    counts = count_published()
    return Summary(
        counts,
        note="The paper names neither the LoRA targets nor the form for convolutions; every Linear "
        "and Conv2d in loralib's form comes closest. This package stores PEFT's form.",
        shown={name: f"{count / 1e6:.2f}M" for name, count in counts.items()},
    )


def count_published() -> dict[str, Any]:
    """Count the weights of a rank-64 Dot of Stable Diffusion 1.4, in both forms of LoRA.

    Returns:
        Counts by name, with those of the paper beside them.
    """
    unet = stable_diffusion_unet()
    with torch.device("meta"):
        dot = UNetDot(unet, PUBLISHED_SHAPE)
    lora = count_lora(unet, PUBLISHED_SHAPE.lora_rank)
    extra = sum(p.numel() for n, p in dot.named_parameters() if not n.startswith("residuals."))
    return {
        "weights of the Dash": sum(p.numel() for p in unet.parameters()),
        "weights of the Dash, paper": PUBLISHED_WEIGHTS["Dash"],
        "weights of the extra blocks": extra,
        **{f"weights of LoRA on {name}": n for name, n in lora.items()},
        "weights of the Dot, loralib form": extra + lora["linear"] + lora["conv, loralib"],
        "weights of the Dot, PEFT form": extra + lora["linear"] + lora["conv, PEFT"],
        "weights of the Dot, paper": PUBLISHED_WEIGHTS["Dot"],
        "weights of the Dot as built here": dot.own_parameters(),
    }


def stable_diffusion_unet() -> nn.Module:
    """Build the UNet of Stable Diffusion 1.4, on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )


def count_lora(network: nn.Module, rank: int) -> dict[str, int]:
    """Count the weights of LoRA on every layer; convolutions in PEFT's form and in loralib's."""
    counts = {"linear": 0, "conv, PEFT": 0, "conv, loralib": 0}
    for _, _, layer in iterate_targets(dict(network.named_children())):
        out, inputs = layer.weight.shape[:2]
        if isinstance(layer, nn.Linear):
            counts["linear"] += rank * (out + inputs)
            continue

        # PEFT: k x k down, 1 x 1 up. loralib: k x k for both.
        area = layer.kernel_size[0] * layer.kernel_size[1]
        counts["conv, PEFT"] += rank * (inputs * area + out)
        counts["conv, loralib"] += rank * area * (inputs + out)
    return counts
