"""Weights and settings of the method for each data set, from the released scripts.

All share temperature 0.07, 16 groups, pooling 4, 4x4 patches, mask ratio 0.75 and T = 1. ``lambda_fd``
belongs to a summed error: 2e-6 on a 2048 x 64 x 128 map weighs like 33.6 on the mean.
"""

from dataclasses import fields, replace
from typing import Any

from af_dcd.config import DistillConfig
from effml_common.errors import ConfigError
from effml_common.parsing import did_you_mean

PRESETS: dict[str, DistillConfig] = {
    "cityscapes": DistillConfig(),
    # The released R18 script asks for this pair of options under names that its parser refuses.
    "cityscapes_r18": DistillConfig(mask="center", enhanced=True),
    "voc": DistillConfig(lambda_fd=1e-6),
    "camvid": DistillConfig(lambda_fd=8e-6, lambda_ctr=1e-2, pool=1, crop_to_fit=True),
    "ade20k": DistillConfig(lambda_kd=0.5, lambda_fd=1e-6, lambda_ctr=4e-2),
    "coco_stuff164k": DistillConfig(lambda_kd=0.5, lambda_fd=5e-6),
    # Inferred from the paper's figure and ablation: L2, and every other vector as a negative.
    "paper": DistillConfig(p=2, negatives="all"),
}


def replace_settings(config: DistillConfig, settings: dict[str, Any]) -> DistillConfig:
    """Copy a config with other values.

    Raises:
        ConfigError: If a name is unknown or a value out of range.

    >>> replace_settings(PRESETS["voc"], {"groups": 8}).lambda_fd
    1e-06
    """
    known = [field.name for field in fields(DistillConfig)]
    for name in settings:
        if name not in known:
            advice = did_you_mean(name, known, f"use one of {', '.join(known)}")
            raise ConfigError(f"the method has no setting {name!r}; {advice}")
    return replace(config, **settings)
