"""A folder of images as what the Dot trains on: pixels or latents, with their text or class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file, save
from torch import Tensor

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import progress, warn
from morse_diffusion.adapters.pixels import PixelPipeline
from morse_diffusion.errors import UnsupportedDenoiserError
from morse_diffusion.trainer import TrainingData

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BAD_SHARE = 0.01  # of unreadable images that is skipped; more stops the run


def image_files(folder: str) -> list[Path]:
    """Images below a folder, in the order of their paths.

    Raises:
        InputError: If there are none.
    """
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no image; put {', '.join(SUFFIXES)} files there")
    return found


def read_images(
    files: list[Path], side: tuple[int, int], channels: int
) -> tuple[Tensor, list[Path]]:
    """Images cut to the middle and resized, float32 [n, c, h, w] in [-1, 1], and their files.

    Raises:
        InputError: If more than 1 % of them cannot be read.
    """
    pixels, kept = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                picture = image.convert("L" if channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError) as error:
            warn(f"skipped {path.name}: {error}")
            continue
        pixels.append(as_tensor(picture, side))
        kept.append(path)
    if len(kept) < (1 - BAD_SHARE) * len(files) or not kept:
        raise InputError(
            f"{len(files) - len(kept)} of {len(files)} images cannot be read; repair the folder"
        )
    return torch.stack(pixels), kept


def as_tensor(picture: Image.Image, side: tuple[int, int]) -> Tensor:
    """One image, scaled to cover (height, width) and cut to it, [c, h, w] in [-1, 1]."""
    height, width = side
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 127.5 - 1
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def captions_of(files: list[Path], folder: str) -> list[str]:
    """Captions from ``metadata.jsonl`` or text files beside the images; empty where there is none."""
    texts: dict[str, str] = {}
    listing = Path(folder) / "metadata.jsonl"
    if listing.is_file():
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                texts[entry["file_name"]] = entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{listing} line {number} is not a caption ({error}); "
                    'write {"file_name": "a.png", "text": "..."}'
                ) from error
    captions = []
    for path in files:
        beside = path.with_suffix(".txt")
        name = path.relative_to(folder).as_posix()
        captions.append(
            texts[name] if name in texts else beside.read_text().strip() if beside.is_file() else ""
        )
    return captions


def training_data(
    pipe: Any, folder: str, guidance: tuple[float, ...], cache: Path | None = None
) -> tuple[TrainingData, dict[str, Any] | None, tuple[float, float] | None]:
    """Everything training draws from, encoded once.

    Args:
        pipe: ``PixelPipeline``, Stable Diffusion or Stable Diffusion XL.
        folder: Images and captions.
        guidance: Range of scales, or the one scale of a guidance-distilled model.
        cache: Folder that latents and embeddings are kept in.

    Returns:
        Data, the unconditional inputs, and the range that guidance is drawn from; None twice without.

    Raises:
        InputError, UnsupportedDenoiserError: If the folder or the pipeline cannot be used.
    """
    files = image_files(folder)
    if isinstance(pipe, PixelPipeline):
        return _pixels(pipe, files, folder), None, None
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UnsupportedDenoiserError(
            f"train-dot knows no way to encode data for {type(pipe).__name__}; "
            "use DotTrainer with your own TrainingData"
        )
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images, files = read_images(files, (side, side), 3)
    clean = _latents(pipe, images, files, cache)
    cond, negative = _text(pipe, captions_of(files, folder), (side, side))
    if pipe.unet.config.time_cond_proj_dim is None:
        return TrainingData(clean=clean, cond=cond), negative, (guidance[0], guidance[-1])
    # Guidance-distilled (LCM): one pass, the scale goes in as an embedding.
    scale = torch.full((len(clean),), guidance[0] - 1)
    cond["timestep_cond"] = pipe.get_guidance_scale_embedding(
        scale, embedding_dim=pipe.unet.config.time_cond_proj_dim
    )
    return TrainingData(clean=clean, cond=cond), None, None


def _pixels(pipe: PixelPipeline, files: list[Path], folder: str) -> TrainingData:
    config: Any = pipe.unet.config
    size = config.sample_size
    side = (size, size) if isinstance(size, int) else tuple(size)
    images, files = read_images(files, side, config.in_channels)
    if config.num_class_embeds is None:
        return TrainingData(clean=images)
    names = [path.relative_to(folder).parts[0] for path in files]
    known = {name: i for i, name in enumerate(sorted(set(names)))}
    if len(known) > config.num_class_embeds:
        raise InputError(
            f"{len(known)} class folders for a network of {config.num_class_embeds} classes; "
            "put each image into the folder of its class"
        )
    labels = torch.tensor([known[name] for name in names])
    return TrainingData(clean=images, cond={"class_labels": labels})


@torch.no_grad()
def _latents(pipe: Any, images: Tensor, files: list[Path], cache: Path | None) -> Tensor:
    path = None if cache is None else cache / "latents.safetensors"
    if path is not None and path.is_file():
        kept = load_file(path)["latents"]
        if len(kept) == len(images):
            return kept
    parts = []
    vae = pipe.vae.eval()
    with progress("encoding images", len(images)) as bar:
        for part in images.split(8):
            encoded = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean
            parts.append((encoded * vae.config.scaling_factor).float().cpu())
            bar.advance(len(part))
    latents = torch.cat(parts)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({"latents": latents.contiguous()}))
    return latents


@torch.no_grad()
def _text(pipe: Any, captions: list[str], side: tuple[int, int]) -> tuple[dict[str, Any], Any]:
    """Conditional inputs per image, and those of the empty prompt."""
    distinct = sorted({"", *captions})
    encoded = {text: _encode(pipe, text, side) for text in distinct}

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


def _encode(pipe: Any, text: str, side: tuple[int, int]) -> dict[str, Any]:
    device = pipe.unet.device
    if isinstance(pipe, StableDiffusionPipeline):
        embeds, _ = pipe.encode_prompt(text, device, 1, False)
        return {"encoder_hidden_states": embeds.cpu()}
    embeds, _, pooled, _ = pipe.encode_prompt(
        text, device=device, do_classifier_free_guidance=False
    )
    if not text and pipe.config.force_zeros_for_empty_prompt:
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    width = pipe.text_encoder_2.config.projection_dim
    ids = pipe._get_add_time_ids(
        side, (0, 0), side, dtype=embeds.dtype, text_encoder_projection_dim=width
    )
    added = {"text_embeds": pooled.cpu(), "time_ids": ids}
    return {"encoder_hidden_states": embeds.cpu(), "added_cond_kwargs": added}
