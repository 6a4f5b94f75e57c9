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

Data = Literal["drawn", "digits"]
SIDE = 16  # pixels
FIGURE_DIRECTIONS, GROUND_DIRECTIONS = 4, 3  # of the stripes
CLASSES = FIGURE_DIRECTIONS * GROUND_DIRECTIONS
DIGIT_CLASSES, DIGIT_TESTS = 10, 500
TEST_SEED, TEST_IMAGES = 1_000_000, 2000


@dataclass(frozen=True)
class Images:
    """Images [n, 3, SIDE, SIDE] and labels [n]."""

    x: Tensor
    y: Tensor


def draw_images(n: int, generator: torch.Generator, noise: float = 0.25) -> tuple[Tensor, Tensor]:
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

    # Coordinates from -1 to 1, relative to the place of each figure.
    label = torch.randint(CLASSES, (n,), generator=generator)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dx, dy = x - uniform(-0.3, 0.3, 1, 1), y - uniform(-0.3, 0.3, 1, 1)

    # A figure of two to four lobes with a soft edge.
    lobes = torch.randint(2, 5, (n, 1, 1), generator=generator)
    wave = torch.cos(lobes * torch.atan2(dy, dx) + uniform(0, math.tau, 1, 1))
    outline = uniform(0.5, 0.75, 1, 1) * (1 + uniform(0.1, 0.4, 1, 1) * wave)
    inside = torch.sigmoid(20 * (outline - torch.hypot(dx, dy))).unsqueeze(1)

    def draw_stripes(direction: Tensor) -> Tensor:
        angle = direction + uniform(-0.15, 0.15)
        along = x * _per_image(angle.cos()) + y * _per_image(angle.sin())
        stripes = torch.sin(along * uniform(6, 11, 1, 1) + uniform(0, math.tau, 1, 1))
        colour, ink = uniform(-0.5, 0.5, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
        return colour + stripes.unsqueeze(1) * ink

    # The class is the pair of directions.
    figure = draw_stripes((label % FIGURE_DIRECTIONS) * math.pi / FIGURE_DIRECTIONS)
    ground = draw_stripes((label // FIGURE_DIRECTIONS) * math.pi / GROUND_DIRECTIONS)
    image = ground.lerp(figure, inside)
    return 1.5 * (image + noise * torch.randn(image.shape, generator=generator)), label


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


@cache
def read_digits(part: str) -> tuple[Tensor, Tensor]:
    """Read scikit-learn's written digits, enlarged from 8x8; needs scikit-learn.

    Args:
        part: ``test`` for 500 images, ``train`` for the other 1297.

    Returns:
        Images [n, 3, SIDE, SIDE] of mean 0 and standard deviation 1, and labels [n].
    """
    from sklearn.datasets import load_digits

    source: Any = load_digits()
    x, y = torch.from_numpy(source.images).float(), torch.from_numpy(source.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = order[:DIGIT_TESTS] if part == "test" else order[DIGIT_TESTS:]
    x = F.interpolate(x[chosen].unsqueeze(1), (SIDE, SIDE), mode="bilinear")
    return ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous(), y[chosen]


def training_images(n: int, seed: int, data: Data = "drawn") -> Images:
    """Return the labelled images of one seed."""
    generator = torch.Generator().manual_seed(seed)
    if data == "drawn":
        return Images(*draw_images(n, generator))
    x, y = read_digits("train")
    chosen = torch.randperm(len(y), generator=generator)[:n]
    return Images(x[chosen], y[chosen])


def test_images(data: Data) -> Images:
    """Return images that no training sees."""
    if data == "drawn":
        return training_images(TEST_IMAGES, TEST_SEED)
    return Images(*read_digits("test"))


test_images.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def teacher_batch(n: int, generator: torch.Generator, data: Data) -> tuple[Tensor, Tensor]:
    """Return the next batch for a teacher: new drawings, or any digits but those for testing."""
    if data == "drawn":
        return draw_images(n, generator)
    x, y = read_digits("train")
    chosen = torch.randint(len(y), (n,), generator=generator)
    return shift_images(x[chosen], generator), y[chosen]


def shift_images(x: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """Move each image by up to ``most`` pixels, edges mirrored."""
    n, _, h, w = x.shape
    padded = F.pad(x, (most,) * 4, mode="reflect")
    offsets = torch.randint(2 * most + 1, (2, n, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(h), offsets[1] + torch.arange(w)
    index = torch.arange(n).view(n, 1, 1)
    return padded[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
