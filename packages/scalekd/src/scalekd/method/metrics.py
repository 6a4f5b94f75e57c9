"""What a trained student is judged by."""

import torch
from torch import Tensor, nn

IMAGES_PER_PASS = 250  # keeps the memory of an evaluation small


@torch.no_grad()
def top1_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label, in percent.

    Args:
        model: Classifier in evaluation mode, on any device.
        images: [n, 3, h, w] in main memory.
        labels: [n] in main memory.
    """
    device = next(model.parameters()).device
    batches = zip(images.split(IMAGES_PER_PASS), labels.split(IMAGES_PER_PASS), strict=True)
    hits = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return 100 * hits / len(labels)
