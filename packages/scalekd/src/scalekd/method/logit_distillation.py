"""The logit term of the total loss: the student's probabilities beside the teacher's."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from scalekd.method.feature_mimicking import at_least_float32


def logit_loss(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return T^2 times the cross entropy against the teacher's probabilities at temperature T.

    It differs from the Kullback-Leibler divergence by the teacher's entropy, which has no gradient.

    Args:
        student: Logits over k classes; the gradient flows here.
        teacher: Logits over the same classes.
        temperature: T, above 0.

    Raises:
        ValueError: If the numbers of classes differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}; "
            "use a teacher with the same classes, or kd_alpha=0"
        )

    target = F.softmax(at_least_float32(teacher.detach()) / temperature, dim=-1)
    log_probabilities = F.log_softmax(at_least_float32(student) / temperature, dim=-1)
    return -(temperature**2) * (target * log_probabilities).sum(dim=-1).mean()
