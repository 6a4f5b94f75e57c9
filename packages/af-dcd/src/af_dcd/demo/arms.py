"""Arms of the comparison: one student, one teacher, equal crops, different terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from af_dcd.config import DistillConfig, PairConfig
from af_dcd.method.distillation import AfDCDLoss
from af_dcd.method.presets import replace_settings
from effml_common.parsing import require

# Chosen on development scenes; the paper's figures belong to 2048 channels.
METHOD = DistillConfig(
    lambda_fd=5.0, fd_reduction="mean", lambda_ctr=5e-3, groups=8, pool=2, tau=0.7
)
NO_DISTILLATION = {"lambda_kd": 0.0, "lambda_fd": 0.0, "lambda_ctr": 0.0}
KD_ONLY = {"lambda_fd": 0.0, "lambda_ctr": 0.0}
FULL = "full Af-DCD"
MIMICKING = "KD + mimicking"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train the student.

    Args:
        name: For tables.
        method: Settings that differ from ``METHOD``.
        baseline: ``cwd`` or ``mse`` on aligned features, beside logits KD; "" for none.
        weight: Of the baseline's term.
        rate: Learning rate, chosen on development scenes from two.
    """

    name: str
    method: Mapping[str, Any] = field(default_factory=dict)
    baseline: Literal["", "cwd", "mse"] = ""
    weight: float = 0.0
    rate: float = 8e-3

    @property
    def config(self) -> DistillConfig:
        """Settings of the method in this arm."""
        return replace_settings(METHOD, dict(self.method))


ARMS = (
    Arm(name="alone", method=NO_DISTILLATION),
    Arm(name="KD", method=KD_ONLY),
    Arm(name="KD + CWD", method=KD_ONLY, baseline="cwd", weight=1.0),
    Arm(name="KD + feature MSE", method=KD_ONLY, baseline="mse", weight=5.0),
    Arm(name=MIMICKING, method={"lambda_ctr": 0.0}),
    Arm(name="KD + omni contrast", method={"lambda_fd": 0.0}),
    Arm(name="KD + mimicking + spatial", method={"contrast": "spatial"}),
    Arm(name="KD + mimicking + channel", method={"contrast": "channel"}),
    Arm(name=FULL),
)


def build_branch(arm: Arm, config: PairConfig) -> nn.Module | None:
    """Build what an arm trains beside the student; None where that is nothing."""
    channels = 4 * config.student_width, 4 * config.teacher_width
    if arm.baseline:
        return FeatureBaseline(*channels, arm)
    return AfDCDLoss(*channels, arm.config) if arm.config.has_branch else None


class FeatureBaseline(nn.Module):
    """Align the student's features and compare them as another method does."""

    def __init__(self, c_s: int, c_t: int, arm: Arm) -> None:
        super().__init__()
        self.align = nn.Conv2d(c_s, c_t, 1)
        self._compare: Callable[[Tensor, Tensor], Tensor]
        self._compare = cwd_loss if arm.baseline == "cwd" else feature_mse_loss
        self._weight = arm.weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Compute the weighted term."""
        return {"loss_baseline": self._weight * self._compare(self.align(student), teacher)}


def cwd_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], tau: float = 4.0
) -> Float[Tensor, ""]:
    """Compute the KL divergence between the channels' spatial softmaxes (CWD; Shu et al., ICCV 2021).

    tau^2 times the mean over images and channels. The gradient flows to ``student`` only.

    Raises:
        ConfigError: If the shapes differ.

    >>> import torch
    >>> teacher = torch.randn(2, 3, 4, 4)
    >>> cwd_loss(teacher.clone(), teacher).item()
    0.0
    """
    _check_same_shape(student, teacher)
    log_s = (student.flatten(2) / tau).log_softmax(2)
    log_t = (teacher.detach().flatten(2) / tau).log_softmax(2)
    return tau**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2).mean()


def feature_mse_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Compute the mean squared error of two maps; the gradient flows to ``student`` only.

    Raises:
        ConfigError: If the shapes differ.

    >>> import torch
    >>> feature_mse_loss(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0)).item()
    9.0
    """
    _check_same_shape(student, teacher)
    return F.mse_loss(student, teacher.detach())


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    shapes = f"maps of shapes {tuple(student.shape)} and {tuple(teacher.shape)} are compared"
    require(student.shape == teacher.shape, shapes, "align and resize them first")
