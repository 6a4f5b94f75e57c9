"""Chain files: what is wrong with a setting is named with what is allowed."""

from pathlib import Path

import pytest
from com_pt_tiny import clip_chain

from com_pt.training.chain import load_chain, parse_chain
from com_pt.training.tasks.registry import task_class
from effml_common.errors import ConfigError, InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "no stages; list at least one"),
        ({"learning_rate": 1}, "no setting learning_rate; "),
        ({"betaz": [0.9]}, "no setting betaz; did you mean betas"),
        ({"lr": "fast"}, "lr is 'fast'; give a number"),
        ({"lr": 0}, r"lr is 0\.0; try"),
        ({"betas": 0.9}, r"betas are 0\.9; give two"),
        ({"growth": "big"}, "growth is big; use one of embed"),
        ({"depth": "tower"}, "depth is tower; use one of"),
        ({"precision": "int8"}, "precision is int8; use one of"),
        ({"cap": "yes"}, "cap is yes; use one of"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5; give a number"),
        ({"grad_checkpointing": "False"}, "grad_checkpointing is 'False'; give true or false"),
        ({"accum_freq": 0}, "accum_freq is 0; give 1"),
        ({"epochs": -1}, r"epochs are -1\.0; give more"),
        ({"task": "clipp"}, "no task clipp; did you mean clip"),
        ({"task": "nowhere:Task"}, "task nowhere:Task cannot be imported"),
        ({"task": "json:loads"}, "json:loads is no Task; derive"),
        (
            {"task": "com_pt.training.tasks.base:Task"},
            "lacks __getitem__, __len__, build, features, load, loss, macs, save;",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(pictures, change, message) -> None:
    document = {**clip_chain(pictures, 32), **change}
    with pytest.raises(ConfigError, match=message):
        task_class(parse_chain(document).task)(document["data"])


def test_a_chain_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read as YAML: .*cc3m-vit-tsbl"):
        load_chain(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="no list of stages; see"):
        load_chain(tmp_path / "list.yaml")
