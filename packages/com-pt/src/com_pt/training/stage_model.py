"""The module that a stage trains: the successor, and the projectors of its feature loss."""

from typing import Any

from torch import Tensor, nn

from com_pt.method.losses import InverseFeatureLoss
from com_pt.training.tasks.base import Task

PROJECTED = "projected "  # stands before the name of a stream in the predecessor's width


class StageModel(nn.Module):
    """The model in training and the projectors beside it, so that both are synchronised.

    Args:
        task: What ``features`` means.
        model: The successor.
        feature_loss: Its projectors; None in the first stage.
    """

    def __init__(
        self, task: Task, model: nn.Module, feature_loss: InverseFeatureLoss | None
    ) -> None:
        super().__init__()
        self.task = task
        self.model = model
        self.feature_loss = feature_loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the task's outputs, and each stream in the predecessor's width."""
        outputs = self.task.features(self.model, batch)
        if self.feature_loss is None:
            return outputs
        projected = {
            PROJECTED + stream: self.feature_loss.project(stream, outputs[stream])
            for stream in self.task.streams
        }
        return {**outputs, **projected}
