"""Other ways to distil, as training tasks of timm: what the demo compares with.

timm's own tasks (labels alone, logits, pooled features) are used as they are; DIST and plain feature
imitation are written here.
"""

from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.adapters.tail import TeacherSplit
from scalekd.adapters.taps import StudentTap
from scalekd.losses import mimic_loss


def device_of(model: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(model.parameters()).device


def dist_loss(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """One minus the Pearson correlation of probabilities, along classes and along the batch.

    Paper: "Knowledge Distillation from A Stronger Teacher" (Huang et al., NeurIPS 2022), at temperature
    1, with the weights of its ImageNet runs.

    Args:
        student: Logits [b, k].
        teacher: Logits [b, k].
        beta: Weight of the relations within an image (along classes).
        gamma: Weight of the relations within a class (along the batch).
    """
    s, t = student.softmax(-1), teacher.detach().softmax(-1)
    return beta * (1 - _pearson(s, t).mean()) + gamma * (1 - _pearson(s.mT, t.mT).mean())


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return F.cosine_similarity(a, b, dim=-1, eps=1e-8)


class DistTask(TrainingTask):
    """Labels plus DIST."""

    def __init__(self, student: nn.Module, teacher: TeacherSplit, weight: float = 1.0) -> None:
        super().__init__(device=device_of(teacher.model), verbose=False)
        self.trainable_module = student.to(self.device)
        self._split, self.weight = [teacher], weight

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        """Loss and logits."""
        with torch.no_grad():
            teacher: Any = self._split[0].model(input)
        output = self.trainable_module(input)
        loss = F.cross_entropy(output, target) + self.weight * dist_loss(output, teacher)
        return {"loss": loss, "output": output}


class FeatureImitator(nn.Module):
    """A student and a 1x1 convolution from its last map to the teacher's width."""

    def __init__(self, student: nn.Module, channels: int, width: int) -> None:
        super().__init__()
        self.student = student
        self.tap = [StudentTap(student)]
        self.project = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the projected map."""
        logits, _, last = self.tap[0](x)
        return logits, self.project(last)


class FeatureImitationTask(TrainingTask):
    """Labels plus the full view of the last features through a 1x1 convolution, FitNet-like.

    The baseline of the released code; where grids differ the student's map is pooled or repeated to
    the teacher's grid, which that code does not do.
    """

    def __init__(self, student: nn.Module, teacher: TeacherSplit, weight: float) -> None:
        super().__init__(device=device_of(teacher.model), verbose=False)
        cfg: Any = student.to(self.device).pretrained_cfg
        with torch.no_grad():
            x = torch.zeros(2, *cfg["input_size"], device=self.device)
            out = teacher.forward(x)
            channels = StudentTap(student)(x)[2].shape[1]
        imitator = FeatureImitator(student, channels, out.tokens.shape[-1])
        self.trainable_module = imitator.to(self.device)
        self._split, self.weight = [teacher], weight

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module:
        """The student."""
        return self.trainable_module.student

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        """Loss and logits."""
        out = self._split[0].forward(input)
        output, projected = self.trainable_module(input)
        projected = F.adaptive_avg_pool2d(projected, out.grid)
        mimicked = mimic_loss(projected.flatten(2).mT, out.tokens)
        loss = F.cross_entropy(output, target) + self.weight * mimicked
        return {"loss": loss, "output": output}
