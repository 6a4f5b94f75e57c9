"""The size of a clip in latent frames and tokens, and what a transformer costs on it."""

from collections.abc import Mapping
from typing import Any

from fis_dit.adapters.geometry import Geometry
from fis_dit.adapters.layout import FISAdapter
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.method.cost import Cost, flops


def latent_geometry(
    adapter: FISAdapter,
    model_config: Mapping[str, Any],
    clip: tuple[int, int, int],
    compression: tuple[int, int] | None = None,
) -> Geometry:
    """Return (F, H, W), latent frames and rows and columns of tokens, of a clip.

    Args:
        adapter: Of the transformer's class.
        model_config: The transformer's config.
        clip: (frames, height, width) in pixels.
        compression: Video frames per latent frame and pixels per latent pixel; None takes those of the
            model family.
    """
    time, space = compression or adapter.compression
    patch_time, patch_space = adapter.patch(model_config)
    frames, height, width = clip
    latent_frames = (frames - 1) // time + 1
    return (
        -(-latent_frames // patch_time),
        height // space // patch_space,
        width // space // patch_space,
    )


def clip_cost(
    model_class: str,
    model_config: Mapping[str, Any],
    config: FISConfig,
    clip: tuple[int, int, int],
    *,
    steps: int = 4,
) -> Cost:
    """Predict the FLOPs of a transformer's blocks on one clip, over all denoising steps.

    Args:
        model_class: Name of the transformer's class.
        model_config: Its config.
        config: Settings of the sparsity.
        clip: (frames, height, width) in pixels.
        steps: Denoising steps.

    Raises:
        UnsupportedModelError: If the class has no adapter.
    """
    adapter = find_adapter(model_class)
    frames, rows, columns = latent_geometry(adapter, model_config, clip)
    depth = model_config["num_layers"]
    return flops(adapter.shape(model_config), config, depth, frames, rows * columns, steps)
