"""From pictures to tensors: crops, size, and CLIP's mean and deviation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def crop_range(data: Mapping[str, Any], default: tuple[float, float]) -> tuple[float, float]:
    """Return the range of areas that a random crop keeps."""
    low, high = data.get("crop_scale", default)
    return float(low), float(high)


def image_transform(
    size: int | Sequence[int], crop_scale: tuple[float, float] | None
) -> Callable[[Any], Tensor]:
    """Make a transform: a random crop for training, a centre crop otherwise; CLIP's mean and deviation.

    Args:
        size: Height and width of the result in pixels, or one number for both.
        crop_scale: Range of areas that a random crop keeps; None takes the centre.

    Returns:
        A function from a picture to a tensor [3, h, w].
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import v2

    # Crops have the result's aspect ratio, a random one up to a third more or less.
    height, width = (size, size) if isinstance(size, int) else size
    cubic = v2.InterpolationMode.BICUBIC
    if crop_scale is not None:
        ratio = width / height
        ratios = (0.75 * ratio, ratio / 0.75)
        crop = [v2.RandomResizedCrop((height, width), crop_scale, ratios, interpolation=cubic)]
    else:
        resized = (height, width) if height != width else height
        crop = [v2.Resize(resized, cubic), v2.CenterCrop((height, width))]

    # Pixels as CLIP's towers expect them.
    return v2.Compose(
        [
            *crop,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ]
    )
