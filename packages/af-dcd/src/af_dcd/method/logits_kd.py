"""Logits distillation: the student learns the teacher's class probabilities at every pixel.

Hinton, Vinyals, Dean, arXiv 1503.02531; L_kd of the paper.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from effml_common.errors import InputError
from effml_common.parsing import require


def logits_kd_loss(
    student: Float[Tensor, "b k h w"],
    teacher: Float[Tensor, "b k h w"],
    temperature: float = 1.0,
    ignore: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, ""]:
    """Compute T^2 times the mean over pixels of KL(teacher || student), before up-sampling.

    Args:
        student: Class scores; the gradient flows here only.
        teacher: Detached inside.
        temperature: T, above 0; 1 in the paper.
        ignore: Pixels to leave out; None counts all, as the paper does.

    Raises:
        InputError: If the shapes differ or T is not positive.

    >>> import torch
    >>> scores = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).reshape(2, 2, 1, 1)
    >>> logits_kd_loss(scores, scores).item()
    0.0
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"class scores {tuple(student.shape)} and {tuple(teacher.shape)} differ; "
            "the models need the same classes and output size, or lambda_kd=0"
        )
    require(temperature > 0, f"temperature is {temperature}", "give a number above 0")

    # The divergence of each pixel.
    log_s = (student / temperature).log_softmax(1)
    log_t = (teacher.detach() / temperature).log_softmax(1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(1)

    # Its mean over the pixels that count; zero where none does.
    if ignore is not None:
        return temperature**2 * (divergence * ~ignore).sum() / (~ignore).sum().clamp(min=1)
    return temperature**2 * divergence.mean()
