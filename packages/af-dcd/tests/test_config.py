"""Settings of the method: their ranges, and how words become them."""

import pytest

from af_dcd import (
    DistillConfig,
)
from af_dcd.config import parse_options
from effml_common.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"lambda_ctr": -1.0}, {"tau": 0.0}, {"temperature": -1.0}, {"mask_ratio": 1.0}, {"p": 3},
        {"groups": 0}, {"mask": "left"}, {"negatives": "few"}, {"resize": "both"},
        {"lambda_fd": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="; give"):
        DistillConfig(**wrong)


def test_words_become_settings() -> None:
    found = parse_options(("groups=8", "patch=none", "enhanced=true", "mask=center", "tau=0.5"))
    expected = {"groups": 8, "patch": None, "enhanced": True, "mask": "center", "tau": 0.5}
    assert found == expected
    with pytest.raises(ConfigError, match="write name=value"):
        parse_options(("groups",))
