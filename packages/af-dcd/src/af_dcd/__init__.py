"""Af-DCD: augmentation-free dense contrastive distillation for semantic segmentation.

Paper: Fan, Li, Liu, Song, Yao; NeurIPS 2023, arXiv 2312.04168. A frozen teacher's feature map is
mimicked through a mask and contrasted, vector by vector, inside local patches; at inference nothing of
it is left in the student.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "PRESETS": "method.presets",
    "AfDCDLoss": "method.distillation",
    "DistillConfig": "config",
    "Distiller": "method.distiller",
    "MaskedGeneration": "method.mimicking",
    "cwd_loss": "demo.arms",
    "feature_mse_loss": "demo.arms",
    "logits_kd_loss": "method.logits_kd",
    "omni_contrastive_loss": "method.contrast",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'af_dcd' has no attribute {name!r}")
    value = getattr(import_module(f"af_dcd.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
