"""Accuracy of a student on the images of one split."""

from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from effml_common.logging import progress
from scalekd.config import DataConfig
from scalekd.training.data import CheckedImages, dataset_of, evaluation_loader, on_device


@torch.no_grad()
def accuracy_of(
    student: nn.Module,
    config: DataConfig,
    size: int,
    split: str,
    device: torch.device,
    batch: int = 256,
) -> dict[str, float]:
    """Top-1, top-5 (percent) and cross entropy of a student on one split.

    Raises:
        InputError: If the images cannot be read.
    """
    images: Any = dataset_of(config, split, training=False, batch=batch)
    if not isinstance(images, torch.utils.data.IterableDataset):
        classes = getattr(student, "num_classes", 10**9)
        images = CheckedImages(images, classes, config.skip_bad)
    loader = evaluation_loader(images, size, student, batch, config.workers, device)
    evaluator = ClassificationEvaluator(device=device)
    student = student.to(device).eval()
    with progress("evaluating", len(loader)) as bar:
        for batch_of in loader:
            x, y, _ = on_device(batch_of, device, channels_last=False)
            evaluator.update(student(x), y)
            bar.advance()
    found = evaluator.summary()
    return {name: float(found[name]) for name in ("top1", "top5", "loss")}
