"""The demo's Dash: a small ``UNet2DModel`` trained here as a plain DDPM."""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from effml_common.finite import check_finite
from effml_common.logging import progress
from morse_diffusion.config import DashConfig
from morse_diffusion.demo_data import SIDE, images_of

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
CHANNELS = {"digits": 1, "shapes": 3}


def untrained_dash(config: DashConfig) -> UNet2DModel:
    """The network before training; three levels, attention in the deepest."""
    torch.manual_seed(config.dash_seed)
    channels, levels = CHANNELS[config.data], len(config.widths)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=16,
        add_attention=False,
    )


def train_dash(config: DashConfig) -> UNet2DModel:
    """Train the Dash on noise prediction: AdamW, cosine rate, weights averaged at the end.

    Forward and backward run in bfloat16 (autocast), weights in float32.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    images, _ = images_of(config.data)
    model = untrained_dash(config).train()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.dash_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.dash_seed)
    with progress(f"training the Dash on {config.data}", config.dash_steps) as bar:
        for step in range(config.dash_steps):
            rate = 0.5 * (1 + math.cos(math.pi * step / config.dash_steps))
            optimizer.param_groups[0]["lr"] = config.dash_lr * min(1, (step + 1) / 50) * rate
            loss = noise_loss(model, scheduler, images, config.dash_batch, generator)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            check_finite(loss, norm, step=step, term="noise prediction")
            optimizer.step()
            with torch.no_grad():
                decay = min(0.995, (1 + step) / (10 + step))
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - decay)
            bar.advance(loss=loss.item())
    model.load_state_dict(average, strict=False)
    return model.eval()


def noise_loss(
    model: nn.Module, scheduler: Any, images: Tensor, batch: int, generator: torch.Generator
) -> Tensor:
    """Mean squared error of predicted noise on a random batch."""
    clean = images[torch.randint(len(images), (batch,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        guess = model(scheduler.add_noise(clean, noise, t), t).sample
    return (guess.float() - noise).square().mean()
