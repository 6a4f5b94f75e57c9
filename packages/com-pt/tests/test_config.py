"""Settings and their defaults."""

import pytest

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
