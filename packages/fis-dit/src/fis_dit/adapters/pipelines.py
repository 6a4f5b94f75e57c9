"""Load local diffusers pipelines, and run them so that dense and sparse runs see the same noise."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effml_common.device import synchronize
from effml_common.errors import InputError
from fis_dit.adapters.apply import COMPONENTS
from fis_dit.adapters.registry import find_adapter


def load_pipeline(
    directory: str, dtype: torch.dtype, device: torch.device, lora: str | None = None
) -> Any:
    """Load a pipeline with diffusers.

    Args:
        directory: Of the pipeline, with its model_index.json.
        dtype: Of the weights.
        device: Where they go.
        lora: Safetensors file of LoRA weights to add.

    Raises:
        InputError: If it is no such directory, it has no transformer that fis-dit knows, or the LoRA
            does not fit.
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

    # A class that fis-dit does not know is refused before weights are moved.
    for name in COMPONENTS:
        if getattr(pipe, name, None) is not None:
            find_adapter(getattr(pipe, name))
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    if lora is not None:
        _load_lora(pipe, lora)
    return pipe


def _load_lora(pipe: Any, path: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; give the safetensors file of a LoRA")
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    try:
        pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not fit the model ({error}); check the file") from error


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """What a pipeline is asked for.

    Attributes:
        prompt: What the clip shows.
        clip: (frames, height, width) in pixels.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        seed: Of the noise.
        image: File of the first frame, for image-to-video pipelines.
    """

    prompt: str
    clip: tuple[int, int, int]
    steps: int
    guidance: float = 1.0
    seed: int = 0
    image: str | None = None


def run_pipeline(pipe: Any, request: ClipRequest, output_type: str = "np") -> Any:
    """Make one clip.

    The noise is drawn on the CPU, so that dense and sparse runs, and other devices, see the same.

    Args:
        pipe: A diffusers video pipeline.
        request: What the clip shows, its size and steps.
        output_type: "np", or "latent" to skip the VAE.

    Returns:
        The clip "f h w 3" in [0, 1], or its latent.

    Raises:
        InputError: If the pipeline takes no image, needs one, or needs a package that is missing.
    """
    import inspect

    # Pipelines differ in what they take; what one does not know is left out.
    num_frames, height, width = request.clip
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": request.steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": output_type,
    }
    if "guidance_scale" in accepted:
        arguments["guidance_scale"] = request.guidance
    elif getattr(pipe, "guider", None) is not None:  # HunyuanVideo 1.5
        pipe.guider = pipe.guider.new(guidance_scale=request.guidance)

    # The first frame, for the pipelines that start from one.
    if request.image is not None:
        if "image" not in accepted:
            raise InputError(f"{type(pipe).__name__} takes no image; leave --image out")
        arguments["image"] = _read_first_frame(request)
    elif "image" in accepted and accepted["image"].default is inspect.Parameter.empty:
        raise InputError(f"{type(pipe).__name__} starts from an image; give --image FILE")

    try:
        output = pipe(**{name: value for name, value in arguments.items() if name in accepted})
    except NameError as error:  # diffusers imports ftfy only if it is there, and uses it anyway
        if error.name != "ftfy":
            raise
        raise InputError(f"{type(pipe).__name__} needs ftfy; pip install ftfy") from None
    return output.frames[0]


def _read_first_frame(request: ClipRequest) -> Image.Image:
    _, height, width = request.clip
    return Image.open(request.image or "").convert("RGB").resize((width, height))


@dataclass(frozen=True, kw_only=True)
class TimedClip:
    """A clip and what it took.

    Attributes:
        frames: "f h w 3" in [0, 1], float32.
        seconds: Of the whole run, text encoder and VAE included.
        transformer_seconds: Of the forwards of its transformers.
        summary: What the transformers computed, where they were sparse.
    """

    frames: np.ndarray
    seconds: float
    transformer_seconds: float
    summary: Mapping[str, Any] = field(default_factory=dict)


def make_timed_clip(
    pipe: Any, request: ClipRequest, device: torch.device, *, warm_up: bool
) -> TimedClip:
    """Make a clip with the pipeline as it is, and time it.

    Args:
        pipe: A diffusers video pipeline.
        request: What the clip shows, its size and steps.
        device: That the pipeline runs on.
        warm_up: Make one step before, so that of two runs neither pays for what a device loads and
            allocates once.

    Raises:
        InputError: As ``run_pipeline``.
    """
    if warm_up:
        run_pipeline(pipe, replace(request, steps=1), output_type="latent")

    start = time.monotonic()
    with _time_transformers(pipe, device) as forwards:
        frames = run_pipeline(pipe, request)
    seconds = time.monotonic() - start
    return TimedClip(
        frames=np.asarray(frames, dtype=np.float32),
        seconds=seconds,
        transformer_seconds=sum(forwards),
    )


@contextlib.contextmanager
def _time_transformers(pipe: Any, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of every forward of a pipeline's transformers while the context lasts."""
    starts, seconds = list[float](), list[float]()

    def begin(*_: Any) -> None:
        synchronize(device)
        starts.append(time.perf_counter())

    def end(*_: Any) -> None:
        synchronize(device)
        seconds.append(time.perf_counter() - starts.pop())

    models = [getattr(pipe, name, None) for name in COMPONENTS]
    with contextlib.ExitStack() as hooks:
        for model in models:
            if model is not None:
                hooks.callback(model.register_forward_pre_hook(begin).remove)
                hooks.callback(model.register_forward_hook(end).remove)
        yield seconds
