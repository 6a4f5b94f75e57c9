"""Arms of the comparison: one student, one teacher, equal crops, different terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from af_dcd.config import DistillConfig, PairConfig
from af_dcd.method.distillation import AfDCDLoss
from af_dcd.method.presets import changed
from effml_common.settings import require

# Chosen on development scenes (README); the paper's figures belong to 2048 channels.
METHOD = DistillConfig(
    lambda_fd=5.0, fd_reduction="mean", lambda_ctr=5e-3, groups=8, pool=2, tau=0.7
)
OFF = {"lambda_kd": 0.0, "lambda_fd": 0.0, "lambda_ctr": 0.0}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train the student.

    Args:
        name: For tables.
        method: Settings that differ from ``METHOD``.
        rival: ``cwd`` or ``mse`` on aligned features, beside logits KD.
        weight: Of the rival.
        rate: Learning rate, chosen on development scenes from two.
    """

    name: str
    method: Mapping[str, Any] = field(default_factory=dict)
    rival: str = ""
    weight: float = 0.0
    rate: float = 8e-3

    @property
    def config(self) -> DistillConfig:
        """Settings of the method in this arm."""
        return changed(METHOD, dict(self.method))


KD_ONLY = {"lambda_fd": 0.0, "lambda_ctr": 0.0}
FULL = "full Af-DCD"
MIMICKING = "KD + mimicking"
ARMS = (
    Arm(name="alone", method=OFF),
    Arm(name="KD", method=KD_ONLY),
    Arm(name="KD + CWD", method=KD_ONLY, rival="cwd", weight=1.0),
    Arm(name="KD + feature MSE", method=KD_ONLY, rival="mse", weight=5.0),
    Arm(name=MIMICKING, method={"lambda_ctr": 0.0}),
    Arm(name="KD + omni contrast", method={"lambda_fd": 0.0}),
    Arm(name="KD + mimicking + spatial", method={"contrast": "spatial"}),
    Arm(name="KD + mimicking + channel", method={"contrast": "channel"}),
    Arm(name=FULL),
)


class Rival(nn.Module):
    """Align the student's features and compare them as another method does."""

    def __init__(self, c_s: int, c_t: int, arm: Arm) -> None:
        super().__init__()
        self.align = nn.Conv2d(c_s, c_t, 1)
        self._compare: Callable[[Tensor, Tensor], Tensor]
        self._compare = cwd_loss if arm.rival == "cwd" else feature_mse_loss
        self._weight = arm.weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The weighted term."""
        return {"loss_rival": self._weight * self._compare(self.align(student), teacher)}


def branch_of(arm: Arm, config: PairConfig) -> nn.Module | None:
    """What an arm trains beside the student."""
    channels = 4 * config.student_width, 4 * config.teacher_width
    if arm.rival:
        return Rival(*channels, arm)
    return AfDCDLoss(*channels, arm.config) if arm.config.has_branch else None


def cwd_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], tau: float = 4.0
) -> Float[Tensor, ""]:
    """Channel-wise distillation (Shu et al., ICCV 2021): KL between the channels' spatial softmaxes.

    tau^2 times the mean over images and channels. The gradient flows to ``student`` only.
    """
    require(student.shape == teacher.shape, "maps of two shapes", "align and resize them first")
    log_s = (student.flatten(2) / tau).log_softmax(2)
    log_t = (teacher.detach().flatten(2) / tau).log_softmax(2)
    return tau**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2).mean()


def feature_mse_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Mean squared error of two maps of one shape; the gradient flows to ``student`` only."""
    require(student.shape == teacher.shape, "maps of two shapes", "align and resize them first")
    return F.mse_loss(student, teacher.detach())
