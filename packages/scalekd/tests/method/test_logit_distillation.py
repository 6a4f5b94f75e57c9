"""The logit term against a divergence and the teacher's entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from scalekd.method.logit_distillation import logit_loss

dtype = torch.float64


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_the_logit_loss_is_the_divergence_plus_the_teachers_entropy(t: float) -> None:
    s, teacher = torch.randn(2, 6, 10, dtype=dtype)
    p = F.softmax(teacher / t, -1)
    kl = F.kl_div(F.log_softmax(s / t, -1), p, reduction="batchmean")
    entropy = -(p * p.log()).sum(-1).mean()
    assert logit_loss(s, teacher, t).item() == pytest.approx(t * t * (kl + entropy).item())


def test_the_logit_loss_survives_half_precision_extremes() -> None:
    s = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert math.isfinite(logit_loss(s, torch.zeros(1, 2)).item())


def test_class_counts_that_differ_are_both_named() -> None:
    with pytest.raises(ValueError, match="the student has 5 classes and the teacher 7"):
        logit_loss(torch.zeros(1, 5), torch.zeros(1, 7))
