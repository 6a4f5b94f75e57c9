"""Read local diffusers directories, run their pipelines, write their clips."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effml_common.errors import InputError
from fis_dit.adapters.registry import find_adapter


def load_pipeline(directory: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline with diffusers.

    Raises:
        InputError: If it is no such directory, or has no transformer that fis-dit knows.
    """
    from diffusers import DiffusionPipeline

    path = Path(directory)
    if not (path / "model_index.json").is_file():
        raise InputError(
            f"{directory} has no model_index.json; give a diffusers pipeline directory"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{directory} cannot be loaded ({error}); check its files") from error
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            find_adapter(getattr(pipe, name))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def run_pipeline(
    pipe: Any,
    prompt: str,
    *,
    clip: tuple[int, int, int],
    steps: int,
    guidance: float,
    seed: int,
    image: str | None = None,
    output_type: str = "np",
) -> Any:
    """One clip of (frames, height, width), as "f h w 3" in [0, 1], or the latent.

    The noise is drawn on the CPU, so that dense and sparse runs, and other devices, see the same.
    """
    import inspect

    num_frames, height, width = clip
    accepted = inspect.signature(pipe.__call__).parameters
    given: dict[str, Any] = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": output_type,
    }
    if "guidance_scale" in accepted:
        given["guidance_scale"] = guidance
    elif getattr(pipe, "guider", None) is not None:  # HunyuanVideo 1.5
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
    if image is not None:
        if "image" not in accepted:
            raise InputError(f"{type(pipe).__name__} takes no image; leave --image out")
        given["image"] = Image.open(image).convert("RGB").resize((width, height))
    elif "image" in accepted and accepted["image"].default is inspect.Parameter.empty:
        raise InputError(f"{type(pipe).__name__} starts from an image; give --image FILE")
    try:
        output = pipe(**{name: value for name, value in given.items() if name in accepted})
    except NameError as error:  # diffusers imports ftfy only if it is there, and uses it anyway
        if error.name != "ftfy":
            raise
        raise InputError(f"{type(pipe).__name__} needs ftfy; pip install ftfy") from None
    return output.frames[0]


def write_clip(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write "f h w 3" in [0, 1] as GIF (with Pillow) or MP4 (with imageio), by the suffix.

    Raises:
        InputError: If MP4 is asked for and imageio is not installed.
    """
    images = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    if path.suffix == ".gif":
        first, *rest = (Image.fromarray(image) for image in images)
        first.save(path, save_all=True, append_images=rest, duration=1000 // fps, loop=0)
        return
    try:
        import imageio.v3 as imageio
    except ImportError:
        raise InputError(f"{path.name} needs imageio; install fis-dit[video], or use gif") from None
    imageio.imwrite(path, images, fps=fps, codec="libx264", macro_block_size=1)


def read_transformer_config(model: str) -> tuple[str, dict[str, Any], tuple[int, int] | None]:
    """Class, config and VAE compression of a model, from JSON files alone.

    Args:
        model: Pipeline directory, transformer directory, or a transformer's config.json.

    Returns:
        Class name, config, and (video frames, pixels) per latent one, or None if no VAE tells.

    Raises:
        InputError: If there is no readable config, or its class has no adapter.
    """
    path = Path(model)
    candidates = [path / "transformer" / "config.json", path / "config.json", path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise InputError(f"{model} has no config.json; give a diffusers directory or the file")
    config = _json(file)
    name = config.get("_class_name", "")
    find_adapter(str(name))
    vae = path / "vae" / "config.json"
    return str(name), with_defaults(str(name), config), _compression(vae)


def with_defaults(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a diffusers class: its defaults, where ``config`` says nothing else."""
    import inspect

    import diffusers

    made = getattr(diffusers, name)
    signature = inspect.signature(made.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if p.default is not p.empty}
    return {**defaults, **{k: v for k, v in config.items() if k in defaults}}


def _compression(file: Path) -> tuple[int, int] | None:
    if not file.is_file():
        return None
    config = _json(file)
    names = (
        ("scale_factor_temporal", "scale_factor_spatial"),
        ("temporal_compression_ratio", "spatial_compression_ratio"),
    )
    for time, space in names:
        if isinstance(config.get(time), int) and isinstance(config.get(space), int):
            return config[time], config[space]
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON ({error}); check the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no config; give a transformer's config.json")
    return value


def read_plan(path: str | None) -> Any:
    """The FISConfig in a plan file, or None.

    Raises:
        InputError: If it cannot be read.
    """
    from fis_dit.config import FISConfig

    if path is None:
        return None
    try:
        return FISConfig.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); write it with fis-dit plan") from None
