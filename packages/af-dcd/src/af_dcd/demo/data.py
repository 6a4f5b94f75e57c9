"""A drawn segmentation set: textures that look alike, occlusion, thin wires, rare classes.

Two weak background textures; ellipses and boxes whose class is the orientation (4) and the period (2) of
their stripes, drawn over one another, the last ones rarely; wires 3 pixels wide; small dots. Contrast,
offset, gain and noise are random, noise as strong as the texture. Mirroring would change the classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES = (
    "ground a", "ground b",
    *(f"stripes {angle} deg, {width}" for width in ("fine", "coarse") for angle in (0, 45, 90, 135)),
    "wire", "dot",
)  # fmt: skip
STRIPE_PERIODS = (4.0, 7.0)  # pixels, fine and coarse
STRIPED_CLASSES = 8  # 4 orientations, each fine and coarse
IGNORED = 255  # label of pixels that do not count


@dataclass(frozen=True)
class Scenes:
    """Images [n, 3, side, side] of mean 0 and std near 1, labels [n, side, side] of int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Scenes":
        """Move the scenes to a device, where what is trained on them computes."""
        return Scenes(self.images.to(device), self.labels.to(device))

    def crops(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cut ``count`` random square crops of ``size`` pixels out of random scenes."""
        # Scenes and corners are drawn on the host, so that every device sees the same crops.
        side = self.labels.shape[-1]
        picks = torch.randint(len(self), (count,), generator=generator)
        corners = torch.randint(side - size + 1, (count, 2), generator=generator)
        windows = [
            (int(n), slice(int(y), int(y) + size), slice(int(x), int(x) + size))
            for n, (y, x) in zip(picks, corners, strict=True)
        ]

        # Image and labels are cut at the same place.
        images = torch.stack([self.images[n, :, y, x] for n, y, x in windows])
        return images, torch.stack([self.labels[n, y, x] for n, y, x in windows])


def draw_scenes(count: int, seed: int, side: int = 96) -> Scenes:
    """Draw scenes of ``side`` x ``side`` pixels; equal seeds give equal scenes."""
    rng = np.random.default_rng(seed)
    scenes = [_draw_scene(rng, side) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in scenes]))
    return Scenes(images, torch.from_numpy(np.stack([label for _, label in scenes])))


def _draw_scene(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    # The ground: two textures of different grain, parted by a straight line.
    y, x = np.mgrid[:side, :side].astype(np.float32)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(0.3, 0.7) * side
    split = (x - offset) * np.cos(angle) + (y - offset) * np.sin(angle) > 0
    label = split.astype(np.int64)
    grains = [_smooth(rng.normal(size=(side, side)), width) for width in (1, 2)]
    image = np.where(split, *grains[::-1]) * 0.7

    # Striped shapes over one another, each kind rarer than the one before it.
    weights = 0.75 ** np.arange(STRIPED_CLASSES)
    for _ in range(rng.integers(5, 11)):
        inside = _blob(rng, x, y, side)
        kind = rng.choice(STRIPED_CLASSES, p=weights / weights.sum())
        image = np.where(inside, _stripes(rng, x, y, kind), image)
        label = np.where(inside, CLASSES.index("stripes 0 deg, fine") + kind, label)

    # Wires and dots in front, brighter or darker than what is behind them.
    for _ in range(rng.integers(1, 4)):
        inside = _wire(rng, x, y, side)
        image = np.where(inside, rng.choice([-1.0, 1.0]) * rng.uniform(0.8, 1.6), image)
        label = np.where(inside, CLASSES.index("wire"), label)
    for _ in range(rng.integers(1, 6)):
        cy, cx = rng.uniform(4, side - 4, 2)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(2.2, 3.5) ** 2
        image = np.where(inside, rng.choice([-1.0, 1.0]) * rng.uniform(1.2, 2.0), image)
        label = np.where(inside, CLASSES.index("dot"), label)

    # Color and brightness of the picture, and noise as strong as the texture.
    tint = rng.uniform(0.7, 1.3, size=(3, 1, 1)) * rng.uniform(0.7, 1.3)
    noise = rng.normal(scale=0.6, size=(3, side, side))
    return (tint * image[None] + noise).astype(np.float32), label


def _smooth(noise: np.ndarray, width: int) -> np.ndarray:
    for axis in (0, 1):
        noise = sum(np.roll(noise, k, axis) for k in range(-width, width + 1))  # type: ignore[assignment]
    return noise / noise.std()


def _blob(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    cx, cy = rng.uniform(0, side, 2)
    turn, a, b = rng.uniform(0, np.pi), *rng.uniform(side / 12, side / 5, 2)
    u = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / a
    v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / b
    return u**2 + v**2 < 1 if rng.random() < 0.5 else np.maximum(abs(u), abs(v)) < 0.85


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, kind: int) -> np.ndarray:
    angle, period = kind % 4 * np.pi / 4, STRIPE_PERIODS[kind // 4]
    phase = rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return rng.uniform(0.6, 1.3) * wave + rng.uniform(-0.5, 0.5)


def _wire(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    turn, (cx, cy) = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2) * side
    across = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    along = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    return (abs(across) < 1.5) & (abs(along) < side * rng.uniform(0.2, 0.5))
