"""Write clips as GIF or MP4."""

from pathlib import Path

import numpy as np
from PIL import Image

from effml_common.errors import InputError


def write_clip(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write a clip as GIF (with Pillow) or MP4 (with imageio), by the suffix of the file.

    Args:
        frames: "f h w 3" in [0, 1]; other values are clipped.
        path: File to write.
        fps: Frames per second.

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
