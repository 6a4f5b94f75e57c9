"""The demo's images, all made here: digits up-sampled to 32x32, and coloured shapes."""

import math
from typing import Any

import torch
from torch import Tensor

from effml_common.errors import InputError

SIDE = 32
SHAPES, TEXTURES = 5, 2
CLASSES = SHAPES * TEXTURES


def images_of(name: str) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], float32 [n, channels, 32, 32], and their classes, int64 [n].

    Args:
        name: ``digits`` (1,797 grey images of scikit-learn's, bilinear from 8x8) or ``shapes``
            (8,192 RGB images drawn by ``draw_shapes``).
    """
    return digits() if name == "digits" else draw_shapes(8192, torch.Generator().manual_seed(0))


def digits() -> tuple[Tensor, Tensor]:
    """All digits of scikit-learn; see ``images_of``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn; pip install 'morse-diffusion[demo]', "
            "or use --data shapes"
        ) from error
    data: Any = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")
    return large, torch.tensor(data.target)


def draw_shapes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """RGB images of one shape each, smooth at the edges; see ``images_of``.

    The class is shape (disc, square, triangle, ring, cross) times texture (plain, striped). Place,
    size, turn, colours and the slope of the background are random.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    classes = torch.randint(CLASSES, (n,), generator=generator)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre, size = uniform(-0.35, 0.35, 2, 1, 1), uniform(0.35, 0.55, 1, 1)
    turn = uniform(0, 2 * math.pi, 1, 1)
    u, v = x - centre[:, 0], y - centre[:, 1]
    u, v = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()
    distance = _distances(u / size, v / size)[classes // TEXTURES, torch.arange(n)] * size
    mask = torch.sigmoid(-distance * SIDE)[:, None]  # an edge of about one pixel
    stripes = (1 + torch.sin(u * 18)) / 2 * (classes % TEXTURES == 1)[:, None, None]
    colour, second = uniform(-1, 1, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
    fill = colour + (second - colour) * stripes[:, None]
    slope = uniform(-0.3, 0.3, 2, 3, 1, 1)
    back = uniform(-0.6, 0.6, 3, 1, 1) + slope[:, 0] * x + slope[:, 1] * y
    return (mask * fill + (1 - mask) * back).clamp(-1, 1), classes


def _distances(u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to each unit shape, negative inside, [shapes, n, side, side]."""
    radius = (u.square() + v.square()).sqrt()
    square = torch.maximum(u.abs(), v.abs()) - 0.8
    corners = torch.maximum(u.abs() * math.sqrt(3) / 2 + v / 2, -v) - 0.5
    ring = (radius - 0.75).abs() - 0.22
    bars = (torch.maximum(u.abs() - a, v.abs() - b) for a, b in ((0.95, 0.25), (0.25, 0.95)))
    return torch.stack([radius - 0.9, square, corners, ring, torch.minimum(*bars)])
