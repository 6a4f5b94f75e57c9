"""Read the size of a video, in latent frames and tokens, off the arguments of a transformer's child."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fis_dit.errors import HookStateError

Geometry = tuple[int, int, int]  # latent frames F, height and width in tokens


class ReadGeometry(Protocol):
    """Reads (F, H, W) off the arguments of the probed module."""

    def __call__(
        self, config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Geometry:
        """Return (F, H, W) from the transformer's config and the probe's arguments."""
        ...


def video_geometry(patch: tuple[int, int, int], video: Tensor, frame_dim: int = 2) -> Geometry:
    """Return (F, H, W) of a latent video that is cut into patches.

    Args:
        patch: Latent frames, rows and columns of a patch.
        video: Latent with five dimensions; the last two are height and width.
        frame_dim: Dimension of the frames. An incomplete patch of frames counts as one.
    """
    p_t, p_h, p_w = patch
    frames, height, width = video.shape[frame_dim], video.shape[-2], video.shape[-1]
    return -(-frames // p_t), height // p_h, width // p_w


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, whether it was given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def geometry_from_arguments(names: tuple[str, ...]) -> ReadGeometry:
    """Make a reader for probes that take frames, height and width in tokens as arguments.

    Args:
        names: Of all positional arguments of the probe.
    """

    def read(
        config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Geometry:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        frames, height, width = (given.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            raise HookStateError(
                "this pipeline gives the transformer no num_frames, height and width; use one that "
                "does, or describe the layout with fis_dit.register_adapter"
            )
        return int(frames), int(height), int(width)

    return read
