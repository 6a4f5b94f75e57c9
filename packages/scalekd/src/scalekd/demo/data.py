"""Images of the demo and the benchmark: drawn ones, of which there is no end, and written digits.

A drawn image shows a lobed figure filled with stripes of one of four directions, on a ground striped
in one of three. The class is the pair of directions; outline, place, colours, stripe widths and noise
say nothing about it.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 16
FIGURE, GROUND = 4, 3  # directions
CLASSES = FIGURE * GROUND
DIGIT_CLASSES, DIGIT_TESTS = 10, 500


def drawn(n: int, generator: torch.Generator, noise: float = 0.25) -> tuple[Tensor, Tensor]:
    """Draw labelled images.

    Args:
        n: Images.
        generator: Source of every random number.
        noise: Standard deviation of the noise of each pixel, where a stripe's amplitude is up to 1.

    Returns:
        Images [n, 3, SIDE, SIDE], roughly of mean 0 and standard deviation 1, and labels [n].
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    label = torch.randint(CLASSES, (n,), generator=generator)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dx, dy = x - uniform(-0.3, 0.3, 1, 1), y - uniform(-0.3, 0.3, 1, 1)
    lobes = torch.randint(2, 5, (n, 1, 1), generator=generator)
    wave = torch.cos(lobes * torch.atan2(dy, dx) + uniform(0, math.tau, 1, 1))
    outline = uniform(0.5, 0.75, 1, 1) * (1 + uniform(0.1, 0.4, 1, 1) * wave)
    inside = torch.sigmoid(20 * (outline - torch.hypot(dx, dy))).unsqueeze(1)

    def striped(direction: Tensor) -> Tensor:
        angle = direction + uniform(-0.15, 0.15)
        along = x * _wide(angle.cos()) + y * _wide(angle.sin())
        stripes = torch.sin(along * uniform(6, 11, 1, 1) + uniform(0, math.tau, 1, 1))
        colour, ink = uniform(-0.5, 0.5, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
        return colour + stripes.unsqueeze(1) * ink

    figure = striped((label % FIGURE) * math.pi / FIGURE)
    ground = striped((label // FIGURE) * math.pi / GROUND)
    image = ground.lerp(figure, inside)
    return 1.5 * (image + noise * torch.randn(image.shape, generator=generator)), label


def _wide(per_image: Tensor) -> Tensor:
    return per_image.view(-1, 1, 1)


@cache
def digits(part: str) -> tuple[Tensor, Tensor]:
    """Scikit-learn's written digits, enlarged from 8x8; needs scikit-learn.

    Args:
        part: ``test`` for 500 images, ``train`` for the other 1297.

    Returns:
        Images [n, 3, SIDE, SIDE] of mean 0 and standard deviation 1, and labels [n].
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x, y = torch.from_numpy(found.images).float(), torch.from_numpy(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = order[:DIGIT_TESTS] if part == "test" else order[DIGIT_TESTS:]
    x = F.interpolate(x[chosen].unsqueeze(1), (SIDE, SIDE), mode="bilinear")
    return ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous(), y[chosen]


Data = Literal["drawn", "digits"]


TEST_SEED, TEST_IMAGES = 1_000_000, 2000


@dataclass(frozen=True)
class Images:
    """Images and labels."""

    x: Tensor
    y: Tensor


def training_images(n: int, seed: int, data: Data = "drawn") -> Images:
    """The labelled images of one seed."""
    generator = torch.Generator().manual_seed(seed)
    if data == "drawn":
        return Images(*drawn(n, generator))
    x, y = digits("train")
    chosen = torch.randperm(len(y), generator=generator)[:n]
    return Images(x[chosen], y[chosen])


def test_images(data: Data) -> Images:
    """Images that no training sees."""
    if data == "drawn":
        return training_images(TEST_IMAGES, TEST_SEED)
    return Images(*digits("test"))


test_images.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def stream(n: int, generator: torch.Generator, data: Data) -> tuple[Tensor, Tensor]:
    """A batch for a teacher."""
    if data == "drawn":
        return drawn(n, generator)
    x, y = digits("train")
    chosen = torch.randint(len(y), (n,), generator=generator)
    return shifted(x[chosen], generator), y[chosen]


def shifted(x: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """Each image moved by up to ``most`` pixels, edges mirrored."""
    n, _, h, w = x.shape
    padded = F.pad(x, (most,) * 4, mode="reflect")
    offsets = torch.randint(2 * most + 1, (2, n, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(h), offsets[1] + torch.arange(w)
    index = torch.arange(n).view(n, 1, 1)
    return padded[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
