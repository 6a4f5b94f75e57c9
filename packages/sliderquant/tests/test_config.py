"""Settings: methods that do not mix, and files that are read back."""

import pytest

from effml_common.errors import ConfigError
from effml_common.parsing import dump_config, parse
from sliderquant.config import QuantizeConfig, SliderConfig
from sliderquant.method_config import FOREIGN_SETTINGS

# A value other than the default of every setting that some method does not have.
OTHER_VALUES = {
    "schedule": "block", "shallow": 3, "deep": 3, "window": 3, "stride": 2, "gamma": 1.0,
    "intra_order": "window", "lwc": False, "target_input": "quant", "min_expert_tokens": 8,
    "epochs": 21, "lr_lora": 1e-3, "lr_lwc": 1e-3, "lr_scale": 1e-2, "lr_scale_by_batch": True,
    "lora_rank": 8, "range_epochs": 2, "lr_range": 1e-2,
}  # fmt: skip
REQUIRED = {"model": "m", "calib": ("t",)}


def test_compensated_rounding_is_the_default() -> None:
    shared = {"wbits": 2, "group_size": 64, "sym": False, "batch_size": 8, "abits": 8}
    assert SliderConfig().method == SliderConfig(**shared).method == "compensated"
    assert SliderConfig(abits=4, channel_scale="off").method == "compensated"


@pytest.mark.parametrize("method", FOREIGN_SETTINGS)
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_of_another_method_is_refused(name, method) -> None:
    value = OTHER_VALUES[name]
    if name not in FOREIGN_SETTINGS[method]:
        assert getattr(SliderConfig(method=method, **{name: value}), name) == value
        return
    message = f"{name}: not a setting of the method {method}; add --method (combined|slider)"
    with pytest.raises(ConfigError, match=message):
        SliderConfig(**{name: value}, method=method)


def test_settings_that_no_method_has_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"epochs, lr_range: not a .*; leave it out"):
        SliderConfig(epochs=21, lr_range=1e-2)
    with pytest.raises(ConfigError, match=r"lr_range: not a .* slider; leave it out"):
        SliderConfig(method="slider", epochs=21, lr_range=1e-2)
    with pytest.raises(ConfigError, match=r"stride: .*; add --method combined or slider"):
        SliderConfig(window=2, stride=2)


def test_what_compensated_rounding_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to round; set wbits, or add --method slider"):
        SliderConfig(wbits=16, abits=8)
    with pytest.raises(ConfigError, match=r"nothing for another quantizer .* add --method slider"):
        QuantizeConfig(**REQUIRED, format="pre-quant")
    with pytest.raises(ConfigError, match="nothing to round; set wbits, or add --method slider"):
        SliderConfig(method="combined", wbits=16, abits=8)
    assert SliderConfig(method="slider", wbits=16, abits=8).only_scales
    QuantizeConfig(**REQUIRED, method="slider", format="pre-quant")


def test_a_written_file_is_read_back_to_the_same_settings(tmp_path) -> None:
    config = QuantizeConfig(**REQUIRED, method="combined", range_epochs=2, shallow=2)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = ["--config", str(tmp_path / "config.yaml")]
    assert parse(QuantizeConfig, words, prog="sliderquant quantize") == config
