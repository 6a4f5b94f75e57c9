"""ScaleKD: distil a strong vision transformer into any CNN, MLP or ViT student of timm.

Paper: "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (Fan, Li, Liu, Yao; NeurIPS
2024, arXiv 2411.06786). The parts: cross attention projector (CAP), dual-view feature mimicking (DFM)
and teacher parameter perception (TPP).
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from scalekd.adapters.pairing import plan_pair as plan_pair
    from scalekd.adapters.student import StudentTap as StudentTap
    from scalekd.adapters.task import ScaleKDTask as ScaleKDTask
    from scalekd.adapters.teacher import TeacherSplit as TeacherSplit
    from scalekd.commands.train import train as train
    from scalekd.config import ScaleKDConfig as ScaleKDConfig
    from scalekd.config import TrainConfig as TrainConfig
    from scalekd.method.feature_mimicking import mimic_loss as mimic_loss
    from scalekd.method.projector import CAP as CAP

lazy_exports(
    __name__,
    {
        "CAP": "method.projector",
        "ScaleKDConfig": "config",
        "ScaleKDTask": "adapters.task",
        "StudentTap": "adapters.student",
        "TeacherSplit": "adapters.teacher",
        "TrainConfig": "config",
        "mimic_loss": "method.feature_mimicking",
        "plan_pair": "adapters.pairing",
        "train": "commands.train",
    },
)
