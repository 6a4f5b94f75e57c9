"""Settings and their defaults."""

import math

import pytest

from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.chain import parse_chain
from effml_common.errors import ConfigError


def test_missing_epochs_follow_the_linear_rule() -> None:
    stages = [{"name": str(i), "model": "x"} for i in range(4)]
    chain = parse_chain({"task": "clip", "stages": stages, "individual_epochs": 128})
    assert [chain.epochs_of(i) for i in range(4)] == [128, 25, 20, 16]


def test_a_member_alone_has_a_rate_of_its_own_and_never_that_of_a_grown_start() -> None:
    stages = [{"name": "S", "model": "x"}, {"name": "L", "model": "y", "lr": 5e-4}]
    document = {"task": "clip", "stages": stages, "lr": 2e-3, "warmup_steps": 7}
    alone = parse_chain(document).individual("L").stages[0]
    assert (alone.lr, alone.warmup_steps) == (2e-3, 7)
    for where in (document, stages[1]):  # of all members, or of this one
        where["individual_lr"] = 3e-3
        assert parse_chain(document).individual("L").stages[0].lr == 3e-3
        del where["individual_lr"]
    with pytest.raises(ConfigError, match=r"individual_lr is 0\.0; try 1e-3"):
        parse_chain({**document, "individual_lr": 0})


def test_settings_that_exclude_each_other_are_refused_together() -> None:
    document = {"task": "clip", "stages": [{"name": "S", "model": "x"}], "shard": True}
    for other in ({"compile": True}, {"precision": "fp16"}):
        with pytest.raises(ConfigError, match=r"shard with \w+ is not supported; "):
            parse_chain({**document, **other})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay is -0.1; give 0 or more"),
        ({"warmup_steps": -5}, "warmup_steps is -5; give 0 or more"),
        ({"epochs": math.inf}, "epochs are inf; give more than 0"),
        ({"feature_weight": math.inf}, "feature_weight is inf; give 0"),
    ],
)
def test_numbers_of_a_stage_are_in_range(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        StageConfig(name="T", model="vit_tiny_patch16_224", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.5)}, "give two numbers from 0 to below 1"),
        ({"eps": -1.0}, "eps is -1.0; try 1e-6"),
        ({"lr_floor": -1e-5}, "lr_floor is -1e-05; try 3e-6"),
        ({"individual_epochs": 0}, "individual_epochs are 0; give more than 0"),
    ],
)
def test_numbers_of_a_chain_are_in_range(settings, message) -> None:
    stages = (StageConfig(name="T", model="vit_tiny_patch16_224"),)
    with pytest.raises(ConfigError, match=message):
        ChainConfig(task="classify", stages=stages, **settings)
