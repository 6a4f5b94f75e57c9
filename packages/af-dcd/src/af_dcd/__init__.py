"""Af-DCD: augmentation-free dense contrastive distillation for semantic segmentation.

Paper: Fan, Li, Liu, Song, Yao; NeurIPS 2023, arXiv 2312.04168. A frozen teacher's feature map is
mimicked through a mask and contrasted, vector by vector, inside local patches; at inference nothing of
it is left in the student.
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from af_dcd.config import DistillConfig as DistillConfig
    from af_dcd.demo.arms import cwd_loss as cwd_loss
    from af_dcd.demo.arms import feature_mse_loss as feature_mse_loss
    from af_dcd.method.contrast import omni_contrastive_loss as omni_contrastive_loss
    from af_dcd.method.distillation import AfDCDLoss as AfDCDLoss
    from af_dcd.method.distiller import Distiller as Distiller
    from af_dcd.method.logits_kd import logits_kd_loss as logits_kd_loss
    from af_dcd.method.mimicking import MaskedGeneration as MaskedGeneration
    from af_dcd.method.presets import PRESETS as PRESETS

lazy_exports(
    __name__,
    {
        "PRESETS": "method.presets",
        "AfDCDLoss": "method.distillation",
        "DistillConfig": "config",
        "Distiller": "method.distiller",
        "MaskedGeneration": "method.mimicking",
        "cwd_loss": "demo.arms",
        "feature_mse_loss": "demo.arms",
        "logits_kd_loss": "method.logits_kd",
        "omni_contrastive_loss": "method.contrast",
    },
)
