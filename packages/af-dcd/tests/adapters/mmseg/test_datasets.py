"""The shipped configs read the real directory layouts and build the paper's pairs."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg")

from PIL import Image

from af_dcd.adapters.mmseg.config_files import CONFIGS, read_config

SIZE = (700, 900)  # of each image: height, width
LEAVES = sorted(p for p in CONFIGS.rglob("*.py") if p.parent.name != "_base_")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(path)


def labels(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = np.resize(np.array(values, np.uint8), SIZE)
    Image.fromarray(found).save(path)


def listing(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def cityscapes(root: Path) -> dict[str, int]:
    for split, town in (("train", "ulm"), ("val", "bonn")):
        image(root / f"leftImg8bit/{split}/{town}/{town}_000000_000019_leftImg8bit.png")
        labels(
            root / f"gtFine/{split}/{town}/{town}_000000_000019_gtFine_labelTrainIds.png",
            [0, 18, 255],
        )
    return {"train": 1, "val": 1, "low": 0, "high": 18}


def voc(root: Path) -> dict[str, int]:
    for name, folder in (("a", "SegmentationClass"), ("b", "SegmentationClassAug")):
        image(root / f"JPEGImages/{name}.jpg")
        labels(root / f"{folder}/{name}.png", [0, 20, 255])
    labels(root / "SegmentationClass/b.png", [0, 20, 255])
    for split, names in (("train", ["a"]), ("aug", ["b"]), ("val", ["a", "b"])):
        listing(root / f"ImageSets/Segmentation/{split}.txt", names)
    return {"train": 2, "val": 2, "low": 0, "high": 20}


def camvid(root: Path) -> dict[str, int]:
    for split in ("train", "val", "test"):
        image(root / split / "0001TP_1.png")
        labels(root / f"{split}annot" / "0001TP_1.png", [0, 10, 11])
    return {"train": 1, "val": 1, "low": 0, "high": 10}


def ade20k(root: Path) -> dict[str, int]:
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        image(root / f"images/{split}/{name}.jpg")
        labels(root / f"annotations/{split}/{name}.png", [0, 1, 150])
    return {"train": 1, "val": 1, "low": 0, "high": 149}


def coco_stuff164k(root: Path) -> dict[str, int]:
    for split in ("train2017", "val2017"):
        image(root / f"images/{split}/000000000009.jpg")
        labels(root / f"annotations/{split}/000000000009_labelTrainIds.png", [0, 170, 255])
    return {"train": 1, "val": 1, "low": 0, "high": 170}


@pytest.mark.parametrize("layout", [cityscapes, voc, camvid, ade20k, coco_stuff164k])
def test_a_data_set_is_read_in_its_real_layout_with_the_papers_crop(layout, tmp_path) -> None:
    from mmseg.registry import DATASETS

    root = tmp_path / "data"
    expected = layout(root)
    config = read_config(f"af-dcd::{layout.__name__}/deeplabv3_r18.py")

    def rooted(node):
        if isinstance(node, dict):
            for key, value in node.items():
                node[key] = str(root) if key == "data_root" else rooted(value)
        elif isinstance(node, list):
            return [rooted(value) for value in node]
        return node

    train = DATASETS.build(rooted(config.train_dataloader.dataset))
    held_out = DATASETS.build(rooted(config.val_dataloader.dataset))
    assert (len(train), len(held_out)) == (expected["train"], expected["val"])
    classes = config.model.decode_head.num_classes
    assert len(train.metainfo["classes"]) == classes
    sample = train[0]
    crop = config.model.data_preprocessor.size
    assert all(a <= b for a, b in zip(sample["inputs"].shape[1:], crop, strict=True))
    assert tuple(held_out[0]["inputs"].shape[1:]) == SIZE
    found = held_out[0]["data_samples"].gt_sem_seg.data
    seen = set(found.unique().tolist()) - {255}
    assert seen == {expected["low"], expected["high"]}


def test_camvid_ignores_what_has_no_class(tmp_path) -> None:
    from mmseg.registry import DATASETS

    camvid(tmp_path)
    config = read_config("af-dcd::camvid/deeplabv3_r18.py").val_dataloader.dataset
    config.data_root = str(tmp_path)
    found = DATASETS.build(config)[0]["data_samples"].gt_sem_seg.data
    assert set(found.unique().tolist()) == {0, 10, 255}


def test_camvid_is_read_from_a_list_of_pairs_too(tmp_path) -> None:
    from mmseg.registry import DATASETS

    camvid(tmp_path)
    listing(tmp_path / "pairs.txt", ["train/0001TP_1.png trainannot/0001TP_1.png"])
    config = read_config("af-dcd::camvid/deeplabv3_r18.py").train_dataloader.dataset
    config.update(data_root=str(tmp_path), ann_file="pairs.txt", data_prefix={})
    found = DATASETS.build(config)
    assert len(found) == 1
    assert found[0]["inputs"].shape[0] == 3


@pytest.mark.parametrize("path", LEAVES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_shipped_config_has_the_papers_crop_schedule_and_width(path) -> None:
    config = read_config(str(path))
    name = path.parent.name
    crop = {"cityscapes": (512, 1024), "camvid": (360, 360)}.get(name, (512, 512))
    iterations = 80000 if name == "coco_stuff164k" else 40000
    assert config.model.data_preprocessor.size == crop
    assert config.train_cfg.max_iters == iterations == config.param_scheduler[0].end
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("SGD", 0.02, 1e-4)
    width = 256 if path.stem == "deeplabv3_r101" else 128
    assert config.model.decode_head.channels == width
    scales = [t[0]["scale_factor"] for t in config.train_pipeline[2]["transforms"]]
    assert scales == [k / 10 for k in range(5, 21)]


@pytest.mark.slow
def test_every_shipped_pair_fits_the_papers_preset() -> None:
    """Shapes only: nothing is computed at these sizes."""
    from af_dcd.commands.inspect import inspect
    from af_dcd.config import InspectConfig

    for path in LEAVES:
        if path.stem == "deeplabv3_r101":
            continue
        told = inspect(
            InspectConfig(student=str(path), teacher=str(path.with_name("deeplabv3_r101.py")))
        ).values
        assert told["teacher map"][0] == 2048
        stride = told["crop"][0] / told["teacher map"][1]
        assert 7.9 < stride <= 8
        assert told["student tap"] == told["teacher tap"] == "feat:-1"
