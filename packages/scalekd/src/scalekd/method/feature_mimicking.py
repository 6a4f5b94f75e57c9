"""Dual-view feature mimicking (DFM): student features are compared with the teacher's in two views.

Paper: "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (Fan, Li, Liu, Yao; NeurIPS
2024, arXiv 2411.06786). Shapes: b batch, n tokens, d channels.

The released code sums over tokens and tunes a weight for each pair. Here a loss is the mean over tokens,
so that a weight survives a change of resolution: mean = sum / n, and the weight is n times theirs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

View = Literal["full", "ac"]
SMALLEST_NORM = 1e-12  # of a feature vector, so that a zero vector has a finite gradient


def mimic_loss(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], view: View = "full"
) -> Float[Tensor, ""]:
    """Compare unit vectors along channels: squared distance, mean over tokens and batch.

    Args:
        student: Projected student features; the gradient flows here.
        teacher: Teacher features of the same shape; no gradient flows into them.
        view: ``full`` compares the features as they are, ``ac`` without each channel's mean.

    Returns:
        Scalar in [0, 4], in float32 or wider: 2 (1 - cosine) per token.

    Raises:
        ValueError: If the shapes differ.

    >>> import torch
    >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> mimic_loss(features, features).item(), mimic_loss(-features, features).item()
    (0.0, 4.0)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features "
            f"{tuple(teacher.shape)} differ; project the student first (see CAP)"
        )

    # Half precision would lose what distinguishes two nearly equal directions.
    s, t = at_least_float32(student), at_least_float32(teacher.detach())
    if view == "ac":
        s, t = remove_spatial_mean(s), remove_spatial_mean(t)
    gap = F.normalize(s, dim=-1, eps=SMALLEST_NORM) - F.normalize(t, dim=-1, eps=SMALLEST_NORM)
    return gap.square().sum(dim=-1).mean()


def remove_spatial_mean(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Return the alternative ("ac") view: each channel without its mean over the tokens.

    The released code takes a 2-D DCT, clears the coefficient (0, 0) and transforms back. That basis
    function is constant and orthogonal to the others, so clearing it subtracts the mean.
    """
    return x - x.mean(dim=1, keepdim=True)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32 and leave float64 as it is."""
    # Autocast leaves element-wise arithmetic on float32 alone, so nothing more is needed under it.
    return x if x.dtype == torch.float64 else x.float()
