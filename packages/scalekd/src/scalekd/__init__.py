"""ScaleKD: distil a strong vision transformer into any CNN, MLP or ViT student of timm.

Paper: "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (Fan, Li, Liu, Yao; NeurIPS
2024, arXiv 2411.06786). The parts: cross attention projector (CAP), dual-view feature mimicking (DFM)
and teacher parameter perception (TPP).
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CAP": "method.projector",
    "ScaleKDConfig": "config",
    "ScaleKDTask": "adapters.task",
    "StudentTap": "adapters.student",
    "TeacherSplit": "adapters.teacher",
    "TrainConfig": "config",
    "mimic_loss": "method.feature_mimicking",
    "plan_pair": "adapters.pairing",
    "train": "commands.train",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and timm.
    if name not in _HOMES:
        raise AttributeError(f"module 'scalekd' has no attribute {name!r}")
    value = getattr(import_module(f"scalekd.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
