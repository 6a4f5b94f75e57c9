"""Batches through timm's own loaders, normalised for the student."""

from typing import Any

import torch
from timm.data import create_loader
from torch import Tensor

from scalekd.adapters.pixels import PixelStatistics
from scalekd.training.data import TrainingImages
from scalekd.training.plan import TrainingPlan
from scalekd.training.processes import Processes

EVALUATION_CROP = 0.875  # share of the side that the central crop keeps: 224 of 256


def training_loader(
    images: TrainingImages,
    plan: TrainingPlan,
    pixels: PixelStatistics,
    processes: Processes,
) -> Any:
    """Create timm's loader with the recipe's augmentation.

    Args:
        images: What to load; the loader sets the transform of their data set.
        plan: Names augmentation and loading processes.
        pixels: Mean and standard deviation that the student expects.
        processes: Each loads a part of its own.
    """
    config, recipe, device = plan.config, plan.recipe, processes.device
    repeatable_crops = getattr(images.dataset, "views", None) is not None
    on_card = device.type == "cuda"
    mean, std = map(tuple, pixels)

    return create_loader(
        images.dataset,
        input_size=(3, config.img_size, config.img_size),
        batch_size=images.batch_size,
        is_training=True,
        # Augmentation.
        scale=(config.min_crop, 1.0),
        re_prob=recipe.erase,
        re_mode="pixel",
        color_jitter=config.color_jitter,
        auto_augment=recipe.auto_augment or None,
        interpolation=recipe.interpolation,
        mean=mean,
        std=std,
        # Loading. On the CPU everything happens in the transform, so that a resumed run can repeat
        # its random numbers.
        num_workers=config.workers,
        distributed=processes.world > 1,
        device=device,
        use_prefetcher=on_card and config.cache is None and not repeatable_crops,
        persistent_workers=False,
        pin_memory=on_card,
    )


def evaluation_loader(
    dataset: Any,
    pixels: PixelStatistics,
    *,
    size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Any:
    """Create timm's loader for an evaluation: resize, central crop (224 of 256), bicubic.

    Args:
        dataset: Labelled images.
        pixels: Mean and standard deviation that the student expects.
        size: Side of the crop in pixels.
        batch_size: Images in a batch.
        workers: Loading processes.
        device: Where the student computes.
    """
    mean, std = map(tuple, pixels)
    return create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=batch_size,
        interpolation="bicubic",
        crop_pct=EVALUATION_CROP,
        mean=mean,
        std=std,
        num_workers=workers,
        device=device,
        use_prefetcher=False,
        persistent_workers=False,
    )


def move_batch(batch: Any, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor, Any]:
    """Move a batch to a device.

    Args:
        batch: Images, labels and, from a data set with repeatable crops, indices.
        device: Where to.
        channels_last: Whether images get channels-last memory.

    Returns:
        Images, labels, and the indices or None; the indices stay where they are.
    """
    images, labels, *indices = batch
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True), indices[0] if indices else None
