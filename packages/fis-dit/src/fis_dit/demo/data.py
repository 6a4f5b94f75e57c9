"""The demo's clips: shapes that bounce in a box, and scikit-learn's digits that drift over a canvas.

Every clip has 13 frames and one object whose speed is drawn between 0 and 1.2 pixels per frame, so that
some clips stand still and others cross the picture. Values are standardised with fixed constants.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES = 13
MAX_SPEED = 1.2  # pixels per frame
DIGIT_SIZE = 8  # height and width of scikit-learn's digits, in pixels
TEXT_WIDTH = 16  # of a prompt's token


@dataclass(frozen=True, slots=True)
class ClipSet:
    """What a data set looks like to the model.

    Attributes:
        size: Height and width in pixels.
        patch: Height and width of a patch; a frame has (size / patch)^2 tokens.
        classes: Number of labels, given to the model as text.
        mean: Of the pixels before standardisation.
        std: Same.
        teacher_steps: Training updates of the teacher.
        student_steps: Same of the student.
        paths: Teacher paths that the student learns from.
    """

    size: int
    patch: int
    classes: int
    mean: float
    std: float
    teacher_steps: int
    student_steps: int
    paths: int


CLIP_SETS = {
    "shapes": ClipSet(
        size=9,
        patch=3,
        classes=2,
        mean=0.09,
        std=0.22,
        teacher_steps=1560,
        student_steps=1500,
        paths=768,
    ),
    "digits": ClipSet(
        size=12,
        patch=4,
        classes=10,
        mean=0.135,
        std=0.275,
        teacher_steps=1000,
        student_steps=800,
        paths=384,
    ),
}


def draw_clips(name: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw clips.

    Args:
        name: "shapes" or "digits".
        count: Number of clips b.
        seed: Of labels, starting points and velocities.

    Returns:
        Standardised clips "b 1 f h w" in float32, labels "b" and speeds "b" in pixels per frame.

    Raises:
        KeyError: If there is no such data set.
    """
    # Where every object starts, and how it moves.
    spec = CLIP_SETS[name]
    generator = torch.Generator().manual_seed(seed)
    speed = torch.rand(count, generator=generator) * MAX_SPEED
    angle = torch.rand(count, generator=generator) * 2 * torch.pi
    velocity = speed[:, None] * torch.stack([angle.sin(), angle.cos()], 1)
    start = torch.rand(count, 2, generator=generator)

    # What moves: a shape between walls, or a digit on a canvas.
    if name == "shapes":
        labels = torch.randint(spec.classes, (count,), generator=generator)
        centres = _bounce(start, velocity, 1.5, spec.size - 2.5)
        pixels = _draw_shapes(labels, centres, spec.size)
    else:
        images, targets = _load_digits()
        chosen = torch.randint(len(images), (count,), generator=generator)
        labels = targets[chosen]
        corners = _bounce(start, velocity, 0.0, spec.size - DIGIT_SIZE)
        pixels = _place_images(images[chosen], corners, spec.size)
    return ((pixels - spec.mean) / spec.std)[:, None], labels, speed


def draw_noise(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw starting noise "b 1 f h w" and prompts "b 2 16" of random labels."""
    spec, generator = CLIP_SETS[name], torch.Generator().manual_seed(10_000 + seed)
    noise = torch.randn(count, 1, FRAMES, spec.size, spec.size, generator=generator)
    labels = torch.randint(spec.classes, (count,), generator=generator)
    return noise, encode_labels(labels)


def encode_labels(labels: Tensor) -> Tensor:
    """Make the model's prompt of labels: two tokens, a one-hot label and a constant; "b 2 16"."""
    one_hot = F.one_hot(labels, TEXT_WIDTH).float()
    constant = F.one_hot(torch.full_like(labels, TEXT_WIDTH - 1), TEXT_WIDTH).float()
    return torch.stack([one_hot, constant], 1)


def to_pixels(name: str, values: Tensor) -> Tensor:
    """Undo the standardisation and clip to [0, 1]."""
    spec = CLIP_SETS[name]
    return (values * spec.std + spec.mean).clamp(0, 1)


def _bounce(start: Tensor, velocity: Tensor, low: float, high: float) -> Tensor:
    """Return positions "b f 2" of points that are reflected at the walls of a square."""
    width = high - low
    times = torch.arange(FRAMES)[None, :, None]
    travelled = (start[:, None] * width + velocity[:, None] * times).remainder(2 * width)
    return low + torch.minimum(travelled, 2 * width - travelled)


def _draw_shapes(labels: Tensor, centres: Tensor, size: int) -> Tensor:
    """Draw a Gaussian bump (label 0) or a soft-edged square (label 1) at each centre; "b f h w"."""
    grid = torch.arange(size, dtype=torch.float32)
    dy = (grid - centres[..., 0:1])[..., :, None]
    dx = (grid - centres[..., 1:2])[..., None, :]
    bump = torch.exp(-(dy**2 + dx**2) / (2 * 1.1**2))
    square = (2.0 - dy.abs()).clamp(0, 1) * (2.0 - dx.abs()).clamp(0, 1)
    return torch.where(labels[:, None, None, None] == 0, bump, square)


@cache
def _load_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target).long()


def _place_images(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """Place 8x8 images with their upper left corner at fractional positions; "b f size size"."""
    count = len(images)
    grid = torch.arange(size, dtype=torch.float32)
    rows = (grid - corners[..., 0:1])[..., :, None].expand(-1, -1, size, size)
    columns = (grid - corners[..., 1:2])[..., None, :].expand(-1, -1, size, size)
    # grid_sample wants x before y, and -1 and 1 at the centres of the outer pixels.
    positions = torch.stack([columns, rows], -1) / ((DIGIT_SIZE - 1) / 2) - 1
    frames = images[:, None].expand(-1, FRAMES, -1, -1)
    frames = frames.reshape(count * FRAMES, 1, DIGIT_SIZE, DIGIT_SIZE)
    pixels = F.grid_sample(frames, positions.reshape(-1, size, size, 2), align_corners=True)
    return pixels.reshape(count, FRAMES, size, size)
