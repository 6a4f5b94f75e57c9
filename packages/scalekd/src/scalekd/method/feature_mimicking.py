"""The two views of dual-view feature mimicking (DFM) and the logit term.

Paper: "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (Fan, Li, Liu, Yao; NeurIPS
2024, arXiv 2411.06786). Shapes: b batch, n tokens, d channels, k classes.

The released code sums over tokens and tunes a weight per pair; here a loss is the mean over tokens, so
that a weight survives a change of resolution: mean = sum / n, and the weight is n times theirs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

View = Literal["full", "ac"]
EPS = 1e-12


def remove_constant(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The alternative view: each channel without its spatial mean.

    The released code takes a 2-D DCT, clears the coefficient (0, 0) and transforms back. That basis
    function is constant and orthogonal to the others, so clearing it subtracts the mean.
    """
    return x - x.mean(dim=1, keepdim=True)


def mimic_loss(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], view: View = "full"
) -> Float[Tensor, ""]:
    """Squared distance of the unit vectors along channels, mean over tokens and batch (DFM).

    Args:
        student: Projected student features; the gradient flows here.
        teacher: Teacher features of the same shape; no gradient flows into them.
        view: ``full``, or ``ac`` after ``remove_constant`` of both sides.

    Returns:
        Scalar in [0, 4], in float32 or wider: 2 (1 - cosine) per token.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features "
            f"{tuple(teacher.shape)} differ; project the student first (see CAP)"
        )
    s, t = _wide(student), _wide(teacher.detach())
    if view == "ac":
        s, t = remove_constant(s), remove_constant(t)
    gap = F.normalize(s, dim=-1, eps=EPS) - F.normalize(t, dim=-1, eps=EPS)
    return gap.square().sum(dim=-1).mean()


def logit_loss(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 times the cross entropy against the teacher's probabilities at temperature T.

    Differs from the Kullback-Leibler divergence by the teacher's entropy, which has no gradient.

    Raises:
        ValueError: If the numbers of classes differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}; "
            "use a teacher with the same classes, or kd_alpha=0"
        )
    target = F.softmax(_wide(teacher.detach()) / temperature, dim=-1)
    guess = F.log_softmax(_wide(student) / temperature, dim=-1)
    return -(temperature**2) * (target * guess).sum(dim=-1).mean()


def _wide(x: Tensor) -> Tensor:
    # Autocast leaves element-wise arithmetic on float32 alone, so nothing more is needed under it.
    return x if x.dtype == torch.float64 else x.float()
