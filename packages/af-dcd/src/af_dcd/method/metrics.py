"""Scores of a segmentation: IoU per class, and how well the outlines are met."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TOLERANCE = 1  # pixels that an outline may be off


class Scores:
    """Counts over images; ``classes`` K, labels of ``ignored`` are left out."""

    def __init__(self, classes: int, ignored: int = 255) -> None:
        self.classes, self.ignored = classes, ignored
        self.confusion = torch.zeros(classes, classes)
        self.outlines = torch.zeros(classes, 4)

    def add(self, predicted: Int[Tensor, "b h w"], truth: Int[Tensor, "b h w"]) -> None:
        """Count a batch of label maps, on any device; the counts stay on the host."""
        predicted, truth = predicted.cpu(), truth.cpu()
        seen = truth != self.ignored
        pairs = truth[seen] * self.classes + predicted[seen]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.confusion += counts.reshape(self.classes, self.classes)
        for k in range(self.classes):
            ours, theirs = (outline((x == k).float()) * seen for x in (predicted, truth))
            near_theirs, near_ours = (_widened(x) for x in (theirs, ours))
            met = [(ours * near_theirs).sum(), ours.sum(), (theirs * near_ours).sum(), theirs.sum()]
            self.outlines[k] += torch.stack(met)

    def iou(self) -> Float[Tensor, " k"]:
        """Intersection over union, NaN for a class that is nowhere."""
        hit = self.confusion.diagonal()
        return hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit)

    def mean_iou(self) -> float:
        """Mean over the classes that occur, in per cent."""
        return 100 * float(self.iou().nanmean())

    def boundary_f(self) -> float:
        """Mean over classes of the F-score of outline pixels within the tolerance, in per cent."""
        right, ours, found, theirs = self.outlines.T
        precision, recall = right / ours.clamp(min=1), found / theirs.clamp(min=1)
        f = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        return 100 * float(f[theirs > 0].mean())


def outline(mask: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Pixels of a mask with a pixel of their 3x3 surroundings, inside the image, outside the mask."""
    return mask * F.max_pool2d(1 - mask[:, None], 3, 1, 1)[:, 0]


def _widened(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0]
