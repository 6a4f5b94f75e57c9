"""Labelled images, compared with torchvision's reader and the library datasets."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from com_pt.training.data.labelled import open_labelled
from com_pt.training.tasks.classify import ClassifyTask
from effml_common.errors import InputError

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def open_part(part: str = "train", **data: Any) -> Any:
    return open_labelled(data, part, pil_to_tensor)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Train and val folders of three classes; class 10 sorts before class 9, one file is deeper."""
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(["9", "10", "cats"]):
            for i in range(count):
                place = tmp_path / part / name / ("deep" if i == 2 else "")
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2), (label, i, count)).save(place / f"{i}.PNG")
    (tmp_path / "train" / "cats" / "notes.txt").write_text("no picture")
    return tmp_path


def test_class_folders_are_read_in_the_order_of_torchvision(folders) -> None:
    for part in ("train", "val"):
        expected = ImageFolder(str(folders / part))
        opened = open_part(part, train=str(folders), val=str(folders))
        assert opened.classes == expected.classes == ["10", "9", "cats"]
        assert opened.labels.tolist() == expected.targets
        for i, (picture, _) in enumerate(expected):
            assert torch.equal(opened.image(i), pil_to_tensor(picture))


def test_a_part_with_other_classes_is_refused_by_name(folders) -> None:
    shutil.rmtree(folders / "val" / "9")
    data = {"train": str(folders), "val": str(folders / "val")}
    with pytest.raises(InputError, match=r"class 9 of .*val is in train but not in val"):
        open_part("val", **data)
    (folders / "val" / "9").mkdir()
    with pytest.raises(InputError, match=r"class folder .*val/9 has no images; add some"):
        open_part("val", **data)
    shutil.rmtree(folders / "val")
    with pytest.raises(InputError, match="has no folder val; add it"):
        open_part("val", train=str(folders), val=str(folders))


def test_a_list_of_names_numbers_the_folders(folders) -> None:
    opened = open_part("val", val=str(folders), classes=["cats", "9", "10"])
    assert opened.labels.tolist() == [2, 2, 1, 1, 0, 0]
    with pytest.raises(InputError, match=r"val/9: the label '9' is no class; correct it"):
        open_part("val", val=str(folders), classes=["cats", "10"])
    with pytest.raises(InputError, match="the class 'cats' is listed twice"):
        open_part("val", val=str(folders), classes=["cats", "9", "10", "cats"])


def test_the_classes_of_a_model_are_those_of_its_folders(folders) -> None:
    assert ClassifyTask({"train": str(folders)}).classes == 3
    assert ClassifyTask({"train": str(folders), "classes": 5}).classes == 5
    assert ClassifyTask({}).classes == 1000
    with pytest.raises(InputError, match="has 3 classes, and classes is 2; set data: classes"):
        len(ClassifyTask({"train": str(folders), "classes": 2}))


@pytest.fixture
def table(pictures):
    """Write a table of labels in the folder of pictures, and open it."""

    def write(*labels: str, name: str = "labels.csv", **data: Any) -> Any:
        rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
        (pictures / name).write_text(f"path,label\n{rows}")
        return open_part(**{"train": str(pictures / name), **data})

    return write


def test_labels_of_a_table_are_numbers_or_names(table, pictures) -> None:
    opened = table("2", "0", " 02", classes=4)
    assert (opened.classes, opened.labels.tolist()) == (["0", "1", "2", "3"], [2, 0, 2])
    opened = table("cat", "dog", "cat", classes=["dog", "cat"])
    assert (opened.classes, opened.labels.tolist()) == (["dog", "cat"], [1, 0, 1])
    opened = table("1", "0", "1", classes=["dog", "cat"])
    assert (opened.classes, opened.labels.tolist()) == (["dog", "cat"], [1, 0, 1])
    opened = table("cat", "dog", "ape")
    assert (opened.classes, opened.labels.tolist()) == (["ape", "cat", "dog"], [1, 2, 0])
    (pictures / "names.txt").write_text("dog\ncat\n\n")
    opened = table("cat", "dog", classes=str(pictures / "names.txt"))
    assert opened.labels.tolist() == [1, 0]


def test_a_held_out_table_has_the_numbers_of_the_training_table(table, pictures) -> None:
    table("cat", "dog", "ape", name="train.csv")
    files = {"train": str(pictures / "train.csv"), "val": str(pictures / "labels.csv")}
    table("dog", "dog")
    opened = open_part("val", **files)
    assert (opened.classes, opened.labels.tolist()) == (["ape", "cat", "dog"], [2, 2])
    table("dog", "bee")
    with pytest.raises(InputError, match=r"labels\.csv, row 3: the label 'bee' is no class"):
        open_part("val", **files)


def test_labels_that_are_no_classes_are_refused(pictures) -> None:
    (pictures / "labels.csv").write_text("path,label\n0.png,0\n1.png,7\n")
    with pytest.raises(InputError, match="row 3: the label '7' is no number below 3"):
        len(ClassifyTask({"train": str(pictures / "labels.csv"), "classes": 3}))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with a Hugging Face data set of two splits: saved to disk, and as Parquet files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["red", "green", "blue"])}
    )

    def split(labels: list[int]) -> Any:
        pictures = [Image.new("RGB", (3, 2), [*COLOURS.values()][label]) for label in labels]
        return datasets.Dataset.from_dict({"picture": pictures, "kind": labels}, features=features)

    both = datasets.DatasetDict({"train": split([2, 0, 1, 2]), "validation": split([1, 2])})
    both.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for name, part in both.items():
        part.to_parquet(str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet"))
    return tmp_path


@pytest.mark.parametrize("source", ["{}/saved", "hf:{}/saved", "{}/parquet", "hf:{}/parquet"])
def test_a_data_set_on_disk_is_read_with_its_classes(saved, source) -> None:
    source = source.format(saved)
    opened = open_part("train", train=source)
    assert (opened.classes, opened.labels.tolist()) == (["red", "green", "blue"], [2, 0, 1, 2])
    assert opened.image(1)[:, 0, 0].tolist() == [*COLOURS["red"]]
    held_out = open_part("val", train=source, val=source)
    assert held_out.labels.tolist() == [1, 2]
    again = open_part("train", train=f"hf:{source.removeprefix('hf:')}@validation")
    assert again.labels.tolist() == [1, 2]
    with pytest.raises(InputError, match="has no split test; name one with @: train, validation"):
        open_part("train", train=f"hf:{saved}/saved@test")


def test_columns_that_cannot_be_guessed_are_named(saved) -> None:
    source = {"train": f"{saved}/saved"}
    assert len(open_part("train", **source, image_key="picture", label_key="kind")) == 4
    with pytest.raises(InputError, match="no column colour; label_key is one of picture, kind"):
        open_part("train", **source, label_key="colour")


def test_a_data_set_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf:nobody/nothing cannot be loaded: .*; check the name"):
        open_part("train", train="hf:nobody/nothing")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r'needs the library datasets; pip install "com-pt\[dat'):
        open_part("train", train="hf:nobody/nothing")
