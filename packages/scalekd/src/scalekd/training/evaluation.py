"""Accuracy of a student on the images of one split."""

from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import nn

from effml_common.logging import Progress
from scalekd.adapters.pixels import normalisation
from scalekd.config import DataConfig
from scalekd.training.data import CheckedImages, open_dataset
from scalekd.training.loaders import evaluation_loader

ANY_LABEL = 10**9  # upper limit of labels for a student that names no number of classes


@torch.no_grad()
def measure_accuracy(
    student: nn.Module,
    config: DataConfig,
    *,
    size: int,
    device: torch.device,
    batch_size: int = 256,
) -> dict[str, float]:
    """Measure a student on the evaluation split.

    Args:
        student: Moved to ``device`` and put into evaluation mode.
        config: Names the images.
        size: Side of the images in pixels.
        device: Where to compute.
        batch_size: Images per batch.

    Returns:
        ``top1`` and ``top5`` in percent, and ``loss``, the cross entropy.

    Raises:
        InputError: If the images cannot be read.
    """
    # Images whose labels are checked; a stream has no index to name a bad one by.
    images: Any = open_dataset(config, config.val_split, training=False, batch_size=batch_size)
    if not isinstance(images, torch.utils.data.IterableDataset):
        classes = getattr(student, "num_classes", ANY_LABEL)
        images = CheckedImages(images, classes, config.skip_bad)
    loader = evaluation_loader(
        images,
        normalisation(student),
        size=size,
        batch_size=batch_size,
        workers=config.workers,
        device=device,
    )

    # One pass over the split.
    evaluator = ClassificationEvaluator(device=device)
    student = student.to(device).eval()
    with Progress("evaluating", len(loader)) as bar:
        for batch in loader:
            x, y, *_ = (part.to(device, non_blocking=True) for part in batch)
            evaluator.update(student(x), y)
            bar.advance()
    summary = evaluator.summary()
    return {name: float(summary[name]) for name in ("top1", "top5", "loss")}
