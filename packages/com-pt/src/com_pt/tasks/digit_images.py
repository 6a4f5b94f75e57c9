"""Handwritten digits with labels, from scikit-learn: a small image set for timm models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from com_pt.tasks.classify import ClassifyTask

TRAIN = 1400


class DigitImages(ClassifyTask):
    """8x8 digits with random shifts and noise; ``noise`` is the deviation added in training."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({"classes": 10})
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = images[order].expand(-1, 3, -1, -1)
        self.labels = torch.tensor(digits.target)[order]
        self.noise = float(data.get("noise", 0.3))

    def __len__(self) -> int:
        return TRAIN

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        image = torch.roll(image, (dy, dx), (1, 2))
        return image + self.noise * torch.randn(image.shape), self.labels[index]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Top-1 on the 397 held-out digits."""
        return self.accuracy(model, self.images[TRAIN:], self.labels[TRAIN:])

    def chance(self) -> float:
        """One in ten."""
        return 0.1
