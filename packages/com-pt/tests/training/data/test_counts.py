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


CAPTIONS = "caps.csv"
IDLE = [
    ("clip", {"train": "{00..07}.tar", "images": "photos"}, "images"),
    ("clip", {"train": ["a.tar", "b.tar"], "val": "c.TAR", "image_key": "jpg"}, "image_key"),
    ("clip", {"train": CAPTIONS, "image_key": "photo"}, "image_key"),
    ("clip", {"train": "hf:x/y", "images": "photos"}, "images"),
    ("classify", {"train": "FOLDER", "images": "photos"}, "images"),
    ("classify", {"train": "FOLDER", "val": "l.csv", "label_key": "kind"}, "label_key"),
    ("classify", {"train": "l.csv", "image_key": "photo"}, "image_key"),
]
IN_USE = [
    ("clip", {"train": "x.tar", "val": CAPTIONS, "images": "photos"}),
    ("clip", {"train": "x.tar", "image_key": "photo", "zero_shot": {"images": "hf:x/y"}}),
    ("classify", {"train": "hf:x/y", "val": "l.csv", "images": "photos", "label_key": "kind"}),
    ("classify", {"images": "photos", "label_key": "kind"}),  # the data come later
    ("clip", {"train": "shards/*", "images": "photos"}),
]


@pytest.mark.parametrize(("task", "data", "name"), IDLE)
def test_a_setting_of_another_kind_of_source_is_refused_by_name(task, data, name, tmp_path) -> None:
    data = {key: str(tmp_path) if value == "FOLDER" else value for key, value in data.items()}
    message = (
        rf"data: {name} is {data[name]}, but none of the data are (tables|data sets) .*; leave"
    )
    with pytest.raises(ConfigError, match=message):
        open_task(task, data)


@pytest.mark.parametrize(("task", "data"), IN_USE)
def test_a_setting_that_one_part_uses_is_taken(task, data) -> None:
    assert open_task(task, data).data == data


def test_a_setting_that_zero_shot_does_not_have_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="zero_shot has no setting label_key; give images, classes"
    ):
        open_task("clip", {"zero_shot": {"images": "hf:x/y", "label_key": "kind"}})
