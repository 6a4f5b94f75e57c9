"""Settings of the data that are of a wrong kind or out of range."""

import pytest

from com_pt.training.tasks.registry import open_task
from effml_common.errors import ConfigError

WRONG = [
    ("clip", "train", 5),
    ("clip", "train", [["a.csv"]]),
    ("clip", "images", 3),
    ("clip", "stream", "false"),
    ("clip", "sentences", "false"),
    ("clip", "local_loss", "no"),
    ("clip", "crop_scale", 0.5),
    ("clip", "crop_scale", [1.0, 0.5]),
    ("clip", "image_size", 8.5),
    ("clip", "val_batch", 0),
    ("clip", "tokenizer", None),
    ("clip", "tokenizer", [1, 2]),
    ("clip", "zero_shot", "val.csv"),
    ("classify", "classes", 10.0),
    ("classify", "classes", 0),
    ("classify", "classes", True),
    ("classify", "smoothing", "abc"),
    ("classify", "smoothing", 2),
    ("causal-lm", "val_blocks", 0),
    ("causal-lm", "tokenizer", 3),
]


@pytest.mark.parametrize(("task", "name", "value"), WRONG)
def test_a_wrong_value_names_its_setting(task, name, value) -> None:
    with pytest.raises(ConfigError, match=rf"^data: {name} is .*; (give|name) "):
        open_task(task, {name: value})
