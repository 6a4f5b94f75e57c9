"""A user's pipeline from disk."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel

from effml_common.errors import InputError
from morse_diffusion.adapters.pixels import PixelPipeline


def load_pipeline(path: str, device: torch.device) -> Any:
    """Load a diffusers pipeline; one of a bare ``UNet2DModel`` becomes a ``PixelPipeline``.

    Args:
        path: Folder that ``save_pretrained`` wrote.
        device: Where it is to run.

    Raises:
        InputError: If the folder holds no pipeline, or one that does not fit on the device.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise InputError(
            f"{path} holds no diffusers pipeline (model_index.json); "
            "save yours with pipe.save_pretrained(folder) and give that folder"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True).to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{path} cannot be loaded on {device}: {error}; check both") from error

    unet = getattr(pipe, "unet", None)
    if isinstance(unet, UNet2DModel) and "vae" not in pipe.components:
        return PixelPipeline(unet.eval(), pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
