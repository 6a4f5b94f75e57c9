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


def test_hidden_folders_and_files_are_no_classes_and_no_pictures(folders) -> None:
    expected = open_part("train", train=str(folders))
    for place in (".ipynb_checkpoints", "__MACOSX", "9/.thumbnails", "9/__MACOSX"):
        (folders / "train" / place).mkdir()
        (folders / "train" / place / "0.png").write_bytes(b"x")
    (folders / "train" / "9" / "._0.PNG").write_bytes(b"x")
    opened = open_part("train", train=str(folders))
    assert opened.classes == expected.classes
    assert opened.labels.tolist() == expected.labels.tolist()
    assert all(torch.equal(opened.image(i), expected.image(i)) for i in range(len(opened)))


def test_a_class_may_be_named_like_a_part(folders) -> None:
    vehicles = folders / "vehicles"
    for name in ("bus", "train", "test"):
        shutil.copytree(folders / "val" / "cats", vehicles / name)
    for part in ("train", "val"):
        opened = open_part(part, **{part: str(vehicles)})
        assert opened.classes == ["bus", "test", "train"]
        assert opened.labels.tolist() == [0, 0, 1, 1, 2, 2]

    # Pictures of parts without class folders are no classes train and test.
    shutil.rmtree(vehicles / "bus")
    with pytest.raises(InputError, match=r"vehicles/train has no class folders; put the images"):
        open_part(train=str(vehicles))


def test_links_that_lead_back_are_not_followed(folders) -> None:
    expected = open_part("train", train=str(folders))
    (folders / "train" / "loop").symlink_to(folders / "train", target_is_directory=True)
    (folders / "train" / "self").symlink_to("self")
    (folders / "elsewhere").mkdir()
    for place, target in (
        ("train/9/here", "."),
        ("train/9/up", ".."),
        ("train/9/away", "../../elsewhere"),
        ("elsewhere/back", "../train/9"),
        ("train/9/gone", "nowhere"),
    ):
        (folders / place).symlink_to(target)
    opened = open_part("train", train=str(folders))
    assert opened.classes == expected.classes
    assert opened.labels.tolist() == expected.labels.tolist()


def test_a_link_to_other_pictures_is_followed(folders) -> None:
    (folders / "train" / "birds").symlink_to(folders / "val" / "cats")
    opened = open_part("train", train=str(folders))
    assert opened.classes == ["10", "9", "birds", "cats"]
    assert opened.labels.tolist().count(2) == 2


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


@pytest.mark.parametrize("classes", [{}, {"classes": 3}, {"classes": 5}])
def test_held_out_folders_are_never_numbered_by_themselves(folders, classes) -> None:
    shutil.rmtree(folders / "val" / "10")
    val = str(folders / "val")
    with pytest.raises(InputError, match=r"class 10 of .*val is in train but not in val"):
        ClassifyTask({"train": str(folders), "val": val, **classes}).open("val")
    number = classes.get("classes", 1000)
    with pytest.raises(InputError, match=rf"val has 2 classes and the model {number}; give --cl"):
        ClassifyTask({"val": val, **classes}).open("val")


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


@pytest.mark.parametrize("classes", [{}, {"classes": 5}])
def test_a_held_out_table_is_numbered_as_the_folders_to_train_on(table, folders, classes) -> None:
    def labels_of(*labels: str) -> list[int]:
        table(*labels, name="val.csv")
        task = ClassifyTask({"train": str(folders), "val": str(folders / "val.csv"), **classes})
        return task.open("val").labels.tolist()

    # Label 9 is the folder of that name, which is the second in alphabetical order.
    assert labels_of("9", "10", "cats", "09") == [1, 0, 2, 1]
    assert labels_of("10") == [0]
    with pytest.raises(InputError, match=r"val\.csv, row 3: the label '0' is no class; correct"):
        labels_of("9", "0")
    for folder in (folders / "train").iterdir():
        folder.rename(folder.with_name(f"n{folder.name}"))
    assert labels_of("2", "0", "2") == [2, 0, 2]  # n10, n9 and ncats have no numbers as names
    assert labels_of("ncats", "n9") == [2, 1]


def test_labels_are_names_where_listed_names_are_numbers(table) -> None:
    assert table("2", "10", "0", classes=["0", "1", "10", "2"]).labels.tolist() == [3, 2, 0]
    assert table("747", "707", classes=["707", "747", "a380"]).labels.tolist() == [1, 0]
    assert table("2", "0", classes=["707", "747", "a380"]).labels.tolist() == [2, 0]
    with pytest.raises(InputError, match="row 3: the label '3' is no class; correct it or add it"):
        table("1", "3", classes=["0", "1", "10", "2"])


@pytest.mark.parametrize("classes", [{}, {"classes": 5}])
def test_names_in_a_table_are_listed_in_the_settings(table, pictures, classes) -> None:
    table("0", "cat")
    message = (
        r"labels\.csv, row 3: the label 'cat' is no number below .*; list the names under data"
    )
    with pytest.raises(InputError, match=message):
        len(ClassifyTask({"train": str(pictures / "labels.csv"), **classes}))


def test_an_empty_label_is_no_class(table) -> None:
    with pytest.raises(InputError, match=r"labels\.csv, row 3: no label; add one, or leave the im"):
        table("cat", " ")


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


def test_classes_of_a_data_set_are_matched_by_name_and_a_missing_picture_is_named(saved) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (3, 2)), None, Image.new("RGB", (3, 2))]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["blue", "red", "green"])}
    )
    rows = {"picture": pictures, "kind": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(saved / "val"))
    opened = ClassifyTask({"train": str(saved / "saved"), "val": str(saved / "val")}).open("val")
    assert (opened.classes, opened.labels.tolist()) == (["red", "green", "blue"], [2, 0, 1])
    with pytest.raises(InputError, match="val, row 1: no picture; replace the picture"):
        opened.image(1)


def test_columns_that_cannot_be_guessed_are_named(saved) -> None:
    source = {"train": f"{saved}/saved"}
    assert len(open_part("train", **source, image_key="picture", label_key="kind")) == 4
    with pytest.raises(InputError, match="no column colour; label_key is one of picture, kind"):
        open_part("train", **source, label_key="colour")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, False], ["0", "1"]),
        (["b", "a"], ["a", "b"]),
        ([[0], [1]], r"row 0: the kind is \[0\], no number and no text; name another column with"),
        ([0.5, 1.0], r"row 0: the kind is 0\.5, no number and no text"),
        ([1, None], "a row has no kind; name another split"),
    ],
)
def test_labels_of_a_column_are_numbers_or_texts(tmp_path, pictures, labels, expected) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(pictures / f"{i}.png") for i in range(2)]
    rows = datasets.Dataset.from_dict({"image": files, "kind": labels})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    data = {"train": str(tmp_path / "saved"), "label_key": "kind"}
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            open_part(**data)
    else:
        opened = open_part(**data)
        assert (opened.classes, opened.labels.tolist()) == (expected, [1, 0])


def test_a_data_set_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf:nobody/nothing cannot be loaded: .*; check the name"):
        open_part("train", train="hf:nobody/nothing")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r'needs the library datasets; pip install "com-pt\[dat'):
        open_part("train", train="hf:nobody/nothing")
