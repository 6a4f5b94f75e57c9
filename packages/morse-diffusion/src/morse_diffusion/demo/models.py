"""The demo's Dash, a small ``UNet2DModel`` trained as a plain DDPM, and the Dot for it.

The digits pair in ``assets`` was made by the functions here, Dash and Dot in two runs, and is kept in
half precision. ``python -m morse_diffusion.demo.models`` makes one anew.
"""

import math
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from effml_common.folders import cache_folder, cache_key
from effml_common.logging import Progress, say
from effml_common.stopping import check_finite
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.estimate import GuidedDash
from morse_diffusion.adapters.schedulers import process_of
from morse_diffusion.config import DashConfig, DemoDotConfig
from morse_diffusion.demo.data import SIDE, load_images
from morse_diffusion.training.accelerator import accelerator_on
from morse_diffusion.training.data import TrainingData
from morse_diffusion.training.trainer import DotTrainer, LoopConfig, update_average

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
CHANNELS = {"digits": 1, "shapes": 3}
# Trained to predict noise on the shapes, the Dash does not learn their many background colours in as
# many updates: an error in the noise at t near T is one of 160 times in the image.
PREDICTIONS = {"digits": "epsilon", "shapes": "v_prediction"}
WARM_UP_STEPS = 50  # over which the Dash's learning rate rises
DASH_CLIP = 1.0  # largest gradient norm of the Dash's training
ASSETS = Path(__file__).parents[1] / "assets"
CPU = torch.device("cpu")


def schedule_settings(data: str) -> dict[str, Any]:
    """Return the settings of schedulers that fit the Dash of one data set."""
    return {**SCHEDULE, "prediction_type": PREDICTIONS[data]}


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 rather than emulates it.

    A CPU without AVX-512 takes 20 times as long for such a convolution as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def demo_pair(config: DemoDotConfig, device: torch.device = CPU) -> tuple[UNet2DModel, MorseDot]:
    """Return the Dash and its Dot on a device: from the package, the user's cache, or trained once.

    Raises:
        NonFiniteError: If training diverges.
    """
    shipped = ASSETS / config.data
    if config == DemoDotConfig(data=config.data) and shipped.is_dir():
        return load_pair(shipped, device)

    # The Dash depends on its own settings alone, so that several Dots can share one.
    dash_settings = settings_of(config, DashConfig)
    dash_folder = cached_folder("dash", dash_settings)
    if not dash_folder.is_dir():
        say(f"training a small denoiser on {config.data} once; it is kept in the user cache folder")
        save_atomically(train_dash(DashConfig(**dash_settings), device), dash_folder)
    dash = load_dash(dash_folder, device)

    dot_folder = cached_folder("dot", settings_of(config, DemoDotConfig))
    if not dot_folder.is_dir():
        save_atomically(train_demo_dot(config, dash), dot_folder)
    return dash, MorseDot.from_pretrained(str(dot_folder), dash)


def settings_of(config: DemoDotConfig, kind: type[DashConfig]) -> dict[str, Any]:
    """Return those settings that a config has from one of its classes."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def cached_folder(role: str, settings: dict[str, Any]) -> Path:
    """Return where a network with these settings is kept, or will be."""
    key = cache_key([settings, PREDICTIONS], ("torch", "diffusers"))
    return cache_folder("morse-diffusion") / f"{role}-{key}"


def load_pair(folder: Path, device: torch.device = CPU) -> tuple[UNet2DModel, MorseDot]:
    """Load a Dash and its Dot from ``folder/dash`` and ``folder/dot``."""
    dash = load_dash(folder / "dash", device)
    return dash, MorseDot.from_pretrained(str(folder / "dot"), dash)


def load_dash(folder: Path, device: torch.device = CPU) -> UNet2DModel:
    """Load a Dash in float32, whatever precision it was stored in."""
    dash = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).float().eval()
    return move_to(dash, device)


def move_to(network: UNet2DModel, device: torch.device) -> UNet2DModel:
    """Move a network to a device and return it."""
    module: Any = network  # diffusers' own ``to`` has no types
    module.to(device)
    return network


def save_atomically(model: Any, folder: Path) -> None:
    """Save a model under a name that exists only when it is complete."""
    staging = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(str(staging))
    try:
        staging.rename(folder)
    except OSError:  # another process trained the same one meanwhile: theirs is as good
        shutil.rmtree(staging)


def untrained_dash(config: DashConfig) -> UNet2DModel:
    """Build the network before training; it has attention in the deepest level."""
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


def train_dash(config: DashConfig, device: torch.device = CPU) -> UNet2DModel:
    """Train the Dash on noise or velocity prediction: AdamW, cosine rate, weights averaged at the end.

    Forward and backward run in bfloat16 (autocast) where the device has it, weights in float32.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # Images, network, optimizer.
    images, _ = load_images(config.data)
    model = move_to(untrained_dash(config).train(), device)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    scheduler = DDPMScheduler(**schedule_settings(config.data))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.dash_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.dash_seed)

    with Progress(f"training the Dash on {config.data}", config.dash_steps) as bar:
        for step in range(config.dash_steps):
            # One update, with a short warm-up and a cosine.
            rate = 0.5 * (1 + math.cos(math.pi * step / config.dash_steps))
            warm_up = min(1, (step + 1) / WARM_UP_STEPS)
            optimizer.param_groups[0]["lr"] = config.dash_lr * warm_up * rate
            loss = denoising_loss(model, scheduler, images, config.dash_batch, generator)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), DASH_CLIP)
            check_finite(loss, norm, step=step, term="denoising")
            optimizer.step()

            # The average that is kept in the end.
            update_average(average, model, min(0.995, (1 + step) / (10 + step)))
            bar.advance(loss=loss.item())

    model.load_state_dict(average, strict=False)
    return model.eval()


def denoising_loss(
    model: nn.Module, scheduler: Any, images: Tensor, batch: int, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of what the scheduler says is predicted, on a random batch.

    Args:
        model: The Dash.
        scheduler: Of diffusers; adds the noise.
        images: All of them, [n, c, h, w].
        batch: Images that are drawn.
        generator: Source of every random number.
    """
    # Random images, noise and times; always drawn on the CPU.
    clean = images[torch.randint(len(images), (batch,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(SCHEDULE["num_train_timesteps"], (batch,), generator=generator)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, t) if is_velocity else noise

    device = next(model.parameters()).device
    clean, noise, target, t = (x.to(device) for x in (clean, noise, target, t))
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        predicted = model(scheduler.add_noise(clean, noise, t), t).sample
    return (predicted.float() - target).square().mean()


def train_demo_dot(config: DemoDotConfig, dash: UNet2DModel) -> MorseDot:
    """Train the demo's Dot where its Dash is; forwards run in bfloat16 (autocast) if they can.

    Raises:
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    # The Dot and what it learns.
    prediction = PREDICTIONS[config.data]
    process = process_of(DDIMScheduler(clip_sample=False, **schedule_settings(config.data)))
    torch.manual_seed(0)
    dot = MorseDot.build(dash, m=config.m, channels=config.channels, lora_rank=config.rank)
    loop = LoopConfig(
        steps=config.dot_steps,
        batch=config.dot_batch,
        lr=config.dot_lr,
        ema=0.99,
        cosine=True,
        min_snr=config.min_snr,
        gap_max=config.gap_max,
        rollout=config.rollout,
    )
    data = TrainingData(clean=load_images(config.data)[0])
    device = next(dash.parameters()).device
    accelerator = accelerator_on(device, "bf16" if has_bfloat16(device) else "no")
    estimate = GuidedDash(dash, process, prediction)

    # Kept until the Dot is done: a training that is stopped goes on where it was.
    unfinished = cached_folder("training", settings_of(config, DemoDotConfig))
    trainer = DotTrainer(estimate, dot, process, data, loop, accelerator)
    unexplained = trainer.run(unfinished, resume=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    dot.trained = {
        "family": process.family,
        "prediction": prediction,
        "steps_of_process": process.steps,
        "residual_left": unexplained,
    }
    return dot


def make_assets() -> None:
    """Train the digits pair and store it in the package, in half precision."""
    config = DemoDotConfig()
    dash = train_dash(DashConfig(**settings_of(config, DashConfig)))
    dash.half().save_pretrained(ASSETS / "digits" / "dash")

    # The Dot learns beside the rounded Dash that it will run with.
    dot = train_demo_dot(config, dash.float())
    dot.half().save_pretrained(str(ASSETS / "digits" / "dot"))


if __name__ == "__main__":
    make_assets()
