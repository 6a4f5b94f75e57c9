"""The presets are the released scripts' settings."""

import pytest

from af_dcd import (
    PRESETS,
    DistillConfig,
)
from af_dcd.method.presets import replace_settings
from effml_common.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kd", "fd", "ctr"),
    [
        ("cityscapes", 1, 2e-6, 5e-3), ("voc", 1, 1e-6, 5e-3), ("camvid", 1, 8e-6, 1e-2),
        ("ade20k", 0.5, 1e-6, 4e-2), ("coco_stuff164k", 0.5, 5e-6, 5e-3),
    ],
)  # fmt: skip
def test_presets_are_the_released_scripts(name, kd, fd, ctr) -> None:
    preset = PRESETS[name]
    assert (preset.lambda_kd, preset.lambda_fd, preset.lambda_ctr) == (kd, fd, ctr)
    assert (preset.tau, preset.groups, preset.patch, preset.mask_ratio) == (0.07, 16, 4, 0.75)
    assert (preset.pool, preset.crop_to_fit) == ((1, True) if name == "camvid" else (4, False))


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean groups"):
        replace_settings(DistillConfig(), {"group": 4})
