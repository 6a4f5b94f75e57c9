"""Scores of a segmentation: IoU per class, and how well the outlines are met."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

OUTLINE_TOLERANCE_PIXELS = 1  # that an outline may be off


class Scores:
    """Counts over images, from which IoU and boundary F follow.

    Args:
        classes: K, number of classes.
        ignored: Label of pixels that do not count.

    >>> import torch
    >>> scores = Scores(2)
    >>> scores.add(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, 1]]]))
    >>> scores.mean_iou()
    50.0
    """

    def __init__(self, classes: int, ignored: int = 255) -> None:
        self.classes, self.ignored = classes, ignored
        self.confusion = torch.zeros(classes, classes)  # truth by prediction
        # Pixels for each class: predicted outline near a true one, predicted outline, true outline
        # near a predicted one, true outline.
        self.outlines = torch.zeros(classes, 4)

    def add(self, predicted: Int[Tensor, "b h w"], truth: Int[Tensor, "b h w"]) -> None:
        """Count a batch of label maps, on any device; the counts stay on the host."""
        # The confusion matrix, from numbers that stand for a pair of classes.
        predicted, truth = predicted.cpu(), truth.cpu()
        counted = truth != self.ignored
        pairs = truth[counted] * self.classes + predicted[counted]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.confusion += counts.reshape(self.classes, self.classes)

        # Pixels of each outline, and how many of them have the other one near.
        for k in range(self.classes):
            predicted_outline, true_outline = (
                outline((labels == k).float()) * counted for labels in (predicted, truth)
            )
            counts = [
                (predicted_outline * _dilate(true_outline)).sum(),
                predicted_outline.sum(),
                (true_outline * _dilate(predicted_outline)).sum(),
                true_outline.sum(),
            ]
            self.outlines[k] += torch.stack(counts)

    def iou(self) -> Float[Tensor, " k"]:
        """Compute intersection over union, NaN for a class that is nowhere."""
        hits = self.confusion.diagonal()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def mean_iou(self) -> float:
        """Average IoU over the classes that occur, in per cent."""
        return 100 * float(self.iou().nanmean())

    def boundary_f(self) -> float:
        """Average over classes the F-score of outline pixels within the tolerance, in per cent."""
        correct, predicted, recalled, true = self.outlines.T
        precision, recall = correct / predicted.clamp(min=1), recalled / true.clamp(min=1)
        f_score = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        return 100 * float(f_score[true > 0].mean())


def outline(mask: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Mark the pixels of a mask that touch a pixel outside the mask, corners included.

    The border of the image is no outline.
    """
    return mask * F.max_pool2d(1 - mask[:, None], 3, 1, 1)[:, 0]


def _dilate(mask: Tensor) -> Tensor:
    side = 2 * OUTLINE_TOLERANCE_PIXELS + 1
    return F.max_pool2d(mask[:, None].float(), side, 1, OUTLINE_TOLERANCE_PIXELS)[:, 0]
