"""What a Dot learns from: pixels or latents, with their text or class, all in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save
from torch import Tensor

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import Progress
from morse_diffusion.adapters.images import ImageFolder, read_image_folder
from morse_diffusion.adapters.pixels import RGB, PixelPipeline, sample_sides
from morse_diffusion.errors import UnsupportedDenoiserError
from morse_diffusion.method.objective import map_tensors

IMAGES_PER_ENCODING = 8  # that the autoencoder sees at once


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything a run draws from, in memory.

    Args:
        clean: Images or latents, [n, ...].
        cond: Nested dict of tensors [n, ...]: the Dash's other inputs per sample.

    >>> data = TrainingData(clean=torch.arange(6.0).view(3, 2), cond={"class_labels": torch.arange(3)})
    >>> data.batch(torch.tensor([2]), torch.device("cpu"))
    (tensor([[4., 5.]]), {'class_labels': tensor([2])})
    """

    clean: Tensor
    cond: dict[str, Any] = field(default_factory=dict)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """Return the samples at ``index`` and their conditions, on a device."""
        return self.clean[index].to(device), map_tensors(self.cond, lambda t: t[index].to(device))


@dataclass(frozen=True, kw_only=True)
class EncodedData:
    """A folder of images as a pipeline's denoiser is trained on it.

    Attributes:
        data: What the updates draw from.
        negative: The Dash's other inputs for the unconditional half; None without guidance.
        guidance: Range that guidance scales are drawn from; None without guidance.
    """

    data: TrainingData
    negative: dict[str, Any] | None = None
    guidance: tuple[float, float] | None = None


def encode_folder(
    pipe: Any, folder: str, guidance: Sequence[float], cache: Path | None = None
) -> EncodedData:
    """Read a folder of images and encode it once for a pipeline.

    Args:
        pipe: ``PixelPipeline``, Stable Diffusion or Stable Diffusion XL.
        folder: Images and captions.
        guidance: Range of scales, or the one scale of a guidance-distilled model.
        cache: Folder that latents are kept in; None keeps none.

    Raises:
        InputError: If the folder cannot be used.
        UnsupportedDenoiserError: If there is no way to encode data for the pipeline.
    """
    in_pixels = isinstance(pipe, PixelPipeline)
    if not in_pixels and not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UnsupportedDenoiserError(
            f"train-dot knows no way to encode data for {type(pipe).__name__}; "
            "use DotTrainer with your own TrainingData"
        )

    # Images at the size that the pipeline makes them in.
    config: Any = pipe.unet.config
    height, width = sample_sides(pipe.unet)
    factor, channels = (1, config.in_channels) if in_pixels else (pipe.vae_scale_factor, RGB)
    sides = (height * factor, width * factor)
    pictures = read_image_folder(folder, sides, channels, with_captions=not in_pixels)

    # As the network sees them.
    if in_pixels:
        return EncodedData(data=_pixel_data(pictures, config.num_class_embeds))
    return _latent_data(pipe, pictures, guidance, cache)


def _pixel_data(folder: ImageFolder, known_classes: int | None) -> TrainingData:
    """Return images with a class each, where the network knows classes: the sub-folders' names."""
    if known_classes is None:
        return TrainingData(clean=folder.images)
    numbers = {name: i for i, name in enumerate(sorted(set(folder.classes)))}
    if len(numbers) > known_classes:
        raise InputError(
            f"{len(numbers)} class folders for a network of {known_classes} classes; "
            "put each image into the folder of its class"
        )
    labels = torch.tensor([numbers[name] for name in folder.classes])
    return TrainingData(clean=folder.images, cond={"class_labels": labels})


def _latent_data(
    pipe: Any, folder: ImageFolder, guidance: Sequence[float], cache: Path | None
) -> EncodedData:
    """Return latents, and the text that belongs to each."""
    sides = (folder.images.shape[-2], folder.images.shape[-1])
    cond, negative = _encode_captions(pipe, folder.captions, sides)
    clean = _encode_images(pipe, folder.images, cache)
    if pipe.unet.config.time_cond_proj_dim is None:
        data = TrainingData(clean=clean, cond=cond)
        return EncodedData(data=data, negative=negative, guidance=(guidance[0], guidance[-1]))

    # Guidance-distilled (LCM): one pass, the scale goes in as an embedding.
    scale = torch.full((len(clean),), guidance[0] - 1)
    cond["timestep_cond"] = pipe.get_guidance_scale_embedding(
        scale, embedding_dim=pipe.unet.config.time_cond_proj_dim
    )
    return EncodedData(data=TrainingData(clean=clean, cond=cond))


@torch.no_grad()
def _encode_images(pipe: Any, images: Tensor, cache: Path | None) -> Tensor:
    """Return latents [n, c, h, w] of images [n, 3, H, W]; read from the cache where they are in it."""
    path = None if cache is None else cache / "latents.safetensors"
    if path is not None and path.is_file():
        cached = load_file(path)["latents"]
        if len(cached) == len(images):
            return cached

    # The mean of each image's latent distribution, in the scale that the denoiser sees.
    parts = []
    vae = pipe.vae.eval()
    with Progress("encoding images", len(images)) as bar:
        for part in images.split(IMAGES_PER_ENCODING):
            mean = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean
            parts.append((mean * vae.config.scaling_factor).float().cpu())
            bar.advance(len(part))
    latents = torch.cat(parts)

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({"latents": latents.contiguous()}))
    return latents


@torch.no_grad()
def _encode_captions(
    pipe: Any, captions: list[str], sides: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the conditional inputs of each image, and those of the empty prompt."""
    encoded = {text: _encode_text(pipe, text, sides) for text in sorted({"", *captions})}

    def stack(texts: list[str]) -> dict[str, Any]:
        parts = [encoded[text] for text in texts]
        cond: dict[str, Any] = {
            "encoder_hidden_states": torch.cat([p["encoder_hidden_states"] for p in parts])
        }
        if "added_cond_kwargs" in parts[0]:
            names = parts[0]["added_cond_kwargs"]
            cond["added_cond_kwargs"] = {
                name: torch.cat([p["added_cond_kwargs"][name] for p in parts]) for name in names
            }
        return cond

    return stack(captions), stack([""])


def _encode_text(pipe: Any, text: str, sides: tuple[int, int]) -> dict[str, Any]:
    """Return what the pipeline gives its denoiser for one prompt, on the CPU, [1, ...]."""
    device = pipe.unet.device
    if isinstance(pipe, StableDiffusionPipeline):
        embeds, _ = pipe.encode_prompt(text, device, 1, False)
        return {"encoder_hidden_states": embeds.cpu()}

    # Stable Diffusion XL has a pooled embedding and the image's size besides.
    embeds, _, pooled, _ = pipe.encode_prompt(
        text, device=device, do_classifier_free_guidance=False
    )
    if not text and pipe.config.force_zeros_for_empty_prompt:
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    width = pipe.text_encoder_2.config.projection_dim
    ids = pipe._get_add_time_ids(
        sides, (0, 0), sides, dtype=embeds.dtype, text_encoder_projection_dim=width
    )
    added = {"text_embeds": pooled.cpu(), "time_ids": ids}
    return {"encoder_hidden_states": embeds.cpu(), "added_cond_kwargs": added}
