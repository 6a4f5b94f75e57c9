"""The sampling loop for a ``UNet2DModel`` and any scheduler, and images to and from pipelines.

diffusers' own DDIM and DDPM pipelines tie the UNet to one scheduler's arguments.
"""

import inspect
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

RGB = 3  # channels


class PixelPipeline:
    """Samples images from noise; has the ``unet`` and ``scheduler`` that Morse looks for.

    Args:
        unet: The denoiser.
        scheduler: Any of diffusers' schedulers.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler

    def to(self, device: torch.device | str) -> "PixelPipeline":
        """Move the network; return the pipeline, as diffusers' own do."""
        network: Any = self.unet  # diffusers' own ``to`` has no types
        network.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        class_labels: Tensor | None = None,
        latents: Tensor | None = None,
        timesteps: list[int] | None = None,
    ) -> Tensor:
        """Sample images in [-1, 1], float [n, c, h, w], not clamped.

        Args:
            batch_size: Number of images; ignored beside ``latents``.
            num_inference_steps: Steps; ignored beside ``timesteps``.
            generator: Of the start and of stochastic steps.
            class_labels: Int64 [n], for class-conditional UNets.
            latents: Start instead of fresh noise, of unit variance.
            timesteps: Times of your own, where the scheduler takes them.
        """
        # The start.
        config: Any = self.unet.config
        weight = next(self.unet.parameters())
        if latents is None:
            shape = (batch_size, config.in_channels, *sample_sides(self.unet))
            place = generator.device if generator is not None else torch.device("cpu")
            latents = torch.randn(shape, generator=generator, device=place)
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=weight.device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=weight.device)
        x = latents.to(weight) * getattr(self.scheduler, "init_noise_sigma", 1.0)

        # What only some networks and schedulers take.
        labels = None if class_labels is None else class_labels.to(weight.device)
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = generator
        scale = getattr(self.scheduler, "scale_model_input", None)  # flow matching has none

        # One call of the network per time.
        for t in self.scheduler.timesteps:
            seen = scale(x, t) if scale else x
            out = self.unet(seen, t, class_labels=labels).sample
            x = self.scheduler.step(out, t, x, **options).prev_sample
        return x


def sample_sides(denoiser: Any) -> tuple[int, int]:
    """Return height and width of the samples that a network is made for."""
    size = denoiser.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def call_inputs(pipe: Any, prompt: str, n: int, scale: float | None = None) -> dict[str, Any]:
    """Return the keyword arguments with which a pipeline makes ``n`` images."""
    if isinstance(pipe, PixelPipeline):
        return {"batch_size": n}
    inputs: dict[str, Any] = {"prompt": [prompt] * n, "output_type": "pt"}
    return inputs if scale is None else {**inputs, "guidance_scale": scale}


def result_images(result: Any) -> Tensor:
    """Return a pipeline's result as float32 images in [-1, 1], [n, c, h, w], on the CPU."""
    if isinstance(result, Tensor):
        return result.float().clamp(-1, 1).cpu()
    return (result.images.float() * 2 - 1).cpu()


def pictures(images: Tensor) -> list[Image.Image]:
    """Return images in [-1, 1], [n, c, h, w], as PIL pictures."""
    values = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [
        Image.fromarray((v[0] if len(v) == 1 else v.permute(1, 2, 0)).contiguous().numpy())
        for v in values
    ]
