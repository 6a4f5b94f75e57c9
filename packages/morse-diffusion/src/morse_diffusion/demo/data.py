"""The demo's images, all made here: digits up-sampled to 32x32, and coloured shapes."""

import math
from typing import Any

import torch
from torch import Tensor

from effml_common.errors import InputError

SIDE = 32  # pixels
DRAWN_SHAPES = 8192  # images of the data set "shapes"
SHAPES, TEXTURES = 5, 2
CLASSES = SHAPES * TEXTURES
STRIPE_FREQUENCY = 18  # radians per unit length; half of the image's side is one


def load_images(name: str) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1], float32 [n, channels, 32, 32], and their classes, int64 [n].

    Args:
        name: ``digits`` (1,797 grey images of scikit-learn's, bilinear from 8x8) or ``shapes``
            (8,192 RGB images drawn by ``draw_shapes``).

    Raises:
        InputError: If scikit-learn, which holds the digits, is not installed.
    """
    if name == "digits":
        return load_digits()
    return draw_shapes(DRAWN_SHAPES, torch.Generator().manual_seed(0))


def load_digits() -> tuple[Tensor, Tensor]:
    """Return all digits of scikit-learn; see ``load_images``."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn; pip install 'morse-diffusion[demo]', "
            "or use --data shapes"
        ) from error
    data: Any = datasets.load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")
    return large, torch.tensor(data.target)


def draw_shapes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw RGB images of one shape each, smooth at the edges; see ``load_images``.

    The class is shape (disc, square, triangle, ring, cross) times texture (plain, striped). Place,
    size, turn, colours and the slope of the background are random.

    Args:
        n: Number of images.
        generator: Source of every random number.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    # The pixels' coordinates in the frame of each shape.
    classes = torch.randint(CLASSES, (n,), generator=generator)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre, size = uniform(-0.35, 0.35, 2, 1, 1), uniform(0.35, 0.55, 1, 1)
    turn = uniform(0, 2 * math.pi, 1, 1)
    u, v = x - centre[:, 0], y - centre[:, 1]
    u, v = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()

    # Where the shape is, and where its stripes are.
    distances = unit_shape_distances(u / size, v / size)
    distance = distances[classes // TEXTURES, torch.arange(n)] * size
    mask = torch.sigmoid(-distance * SIDE)[:, None]  # an edge of about one pixel
    is_striped = (classes % TEXTURES == 1)[:, None, None]
    stripes = (1 + torch.sin(u * STRIPE_FREQUENCY)) / 2 * is_striped

    # Colours of the shape, in front of a background with a slope.
    colour, second = uniform(-1, 1, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
    fill = colour + (second - colour) * stripes[:, None]
    slope = uniform(-0.3, 0.3, 2, 3, 1, 1)
    back = uniform(-0.6, 0.6, 3, 1, 1) + slope[:, 0] * x + slope[:, 1] * y
    return (mask * fill + (1 - mask) * back).clamp(-1, 1), classes


def unit_shape_distances(u: Tensor, v: Tensor) -> Tensor:
    """Return the signed distance to each unit shape, negative inside, [shapes, n, side, side].

    Args:
        u: First coordinate of each pixel, [n, side, side].
        v: Second coordinate.
    """
    radius = (u.square() + v.square()).sqrt()
    square = torch.maximum(u.abs(), v.abs()) - 0.8
    triangle = torch.maximum(u.abs() * math.sqrt(3) / 2 + v / 2, -v) - 0.5
    ring = (radius - 0.75).abs() - 0.22
    bars = (torch.maximum(u.abs() - a, v.abs() - b) for a, b in ((0.95, 0.25), (0.25, 0.95)))
    return torch.stack([radius - 0.9, square, triangle, ring, torch.minimum(*bars)])
