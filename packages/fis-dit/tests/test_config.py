"""Settings: what is refused, presets, and plans as JSON."""

import dataclasses
from typing import Any

import pytest

from effml_common.errors import ConfigError
from fis_dit.config import FISConfig

PLAN = FISConfig(blocks=(1, 2), model_class="WanTransformer3DModel", layers=4, frames=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stride", 0),
        ("stride", -1),
        ("stride", 2.0),
        ("stride", True),
        ("stride", "2"),
        ("lift", "cubic"),
        ("sites", "ffn"),
        ("kv", "none"),
        ("pattern", "spiral"),
        ("step_shift", -1),
        ("dense_head", -1),
        ("blocks", ("1",)),
        ("dense_steps", (0.5,)),
        ("num_inference_steps", 0),
    ],
)
def test_a_bad_field_is_a_value_error_that_names_it(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        FISConfig(**{field: value})


def test_a_state_lift_of_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="sites"):
        FISConfig(lift="state", sites="attn")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="paper-like, quality, safe"):
        FISConfig.from_preset("fast")


def test_a_plan_survives_json_and_a_foreign_file_does_not() -> None:
    plan = dataclasses.replace(PLAN, dense_steps=(-1,), condition_frames=(0,))
    assert FISConfig.from_json(plan.to_json()) == plan
    for text in ("", "[]", "{}", '{"schema": 2}', plan.to_json().replace("stride", "strride")):
        with pytest.raises(ConfigError, match="; "):
            FISConfig.from_json(text)
