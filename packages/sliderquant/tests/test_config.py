"""Settings: two methods that do not mix, and files of earlier versions."""

import pytest

from effml_common.errors import ConfigError
from effml_common.parsing import dump_config, parse
from sliderquant.adapters.shapes import check_linears
from sliderquant.config import SLIDER_SETTINGS, QuantizeConfig, SliderConfig

# A value other than the default of every setting that only windows have.
SLIDER_VALUES = {
    "schedule": "block", "shallow": 3, "deep": 3, "window": 3, "stride": 2, "gamma": 1.0,
    "intra_order": "window", "lwc": False, "target_input": "quant", "min_expert_tokens": 8,
    "epochs": 21, "lr_lora": 1e-3, "lr_lwc": 1e-3, "lr_scale": 1e-2, "lr_scale_by_batch": True,
    "lora_rank": 8,
}  # fmt: skip
REQUIRED = {"model": "m", "calib": ("t",)}


def test_compensated_rounding_is_the_default() -> None:
    shared = {"wbits": 2, "group_size": 64, "sym": False, "batch_size": 8, "abits": 8}
    assert SliderConfig().method == SliderConfig(**shared).method == "compensated"
    assert SliderConfig(abits=4, channel_scale="off").method == "compensated"


@pytest.mark.parametrize("name", SLIDER_SETTINGS)
def test_a_setting_of_the_other_method_is_refused_with_it(name) -> None:
    value = SLIDER_VALUES[name]
    assert getattr(SliderConfig(method="slider", **{name: value}), name) == value
    for method in ({}, {"method": "compensated"}):
        with pytest.raises(ConfigError, match=f"{name}: only the method slider .*; add --method"):
            SliderConfig(**{name: value}, **method)


def test_what_compensated_rounding_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to round; set wbits, or add --method slider"):
        SliderConfig(wbits=16, abits=8)
    with pytest.raises(ConfigError, match=r"nothing for another quantizer .* add --method slider"):
        QuantizeConfig(**REQUIRED, format="pre-quant")
    with pytest.raises(ConfigError, match=r"fused experts \(up\) .*; add --method slider"):
        check_linears({"q": (8, 8), "up": (4, 8, 8)}, SliderConfig(group_size=8))
    assert SliderConfig(method="slider", wbits=16, abits=8).only_scales
    QuantizeConfig(**REQUIRED, method="slider", format="pre-quant")
    check_linears({"up": (4, 8, 8)}, SliderConfig(method="slider", group_size=8))
    check_linears({"up": (4, 8, 8)}, SliderConfig(wbits=16, group_size=8))


@pytest.mark.parametrize(
    ("earlier", "method"),
    [
        ("rounding: nearest\n", "slider"),
        ("rounding: nearest\nepochs: 21\n", "slider"),
        ("rounding: compensated\n", "compensated"),
        ("rounding: auto\n", "compensated"),
        ("rounding: auto\nepochs: 21\n", "slider"),
        ("rounding: auto\nwbits: 16\nabits: 8\n", "slider"),
        ("wbits: 2\n", "compensated"),
    ],
)
def test_a_file_of_an_earlier_version_keeps_its_meaning(earlier, method, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(earlier)
    words = ["m", "--calib", "t", "--config", str(tmp_path / "config.yaml")]
    config = parse(QuantizeConfig, words, prog="sliderquant quantize")
    assert (config.method, config.rounding) == (method, None)

    # Written by this version, it says the method and is read back to the same settings.
    (tmp_path / "again.yaml").write_text(dump_config(config))
    words = ["--config", str(tmp_path / "again.yaml")]
    assert parse(QuantizeConfig, words, prog="sliderquant quantize") == config


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        # Earlier versions ran the other method here, without a word.
        ("epochs: 21\n", "epochs: only the method slider"),
        # Earlier versions ignored these epochs.
        ("rounding: compensated\nepochs: 21\n", "epochs: only the method slider"),
        ("rounding: compensated\nmethod: slider\n", "exclude each other; leave rounding out"),
    ],
)
def test_a_file_of_an_earlier_version_that_says_two_things_is_refused(
    earlier, message, tmp_path
) -> None:
    (tmp_path / "config.yaml").write_text(earlier)
    words = ["m", "--calib", "t", "--config", str(tmp_path / "config.yaml")]
    with pytest.raises(ConfigError, match=message):
        parse(QuantizeConfig, words, prog="sliderquant quantize")
