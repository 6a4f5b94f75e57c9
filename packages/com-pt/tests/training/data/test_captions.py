"""Captions from tables and tars, and what is wrong with them."""

import csv

import pytest
import torch
from com_pt_tiny import clip_data, task_of

from com_pt.training.data.captions import CaptionData
from effml_common.errors import InputError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header with a path and captions; add one"),
        ("path\tone\n", "holds no samples; give a file with some"),
        ("path\tone\n0.png\tred\textra\n", "line 2: 3 columns, not 2"),
        ("path\tone\n0.png\tred\nnone.png\tred\n", r"line 3: none\.png is not there"),
        ("path\tone\n0.png\t \n", "line 2: .*no caption"),
    ],
)
def test_a_wrong_table_names_its_line(pictures, content, message) -> None:
    (pictures / "captions.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        len(task_of(pictures, captions=1))


def test_images_with_too_few_captions_are_refused(pictures) -> None:
    with pytest.raises(InputError, match=r"0\.png: an image has 2 captions, but 3 are drawn"):
        len(task_of(pictures, captions=3))


def test_webdataset_shards_are_read_as_their_own_writer_wrote_them(pictures, tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shard = tmp_path / "shard-000000.tar"
    with (
        open(pictures / "captions.tsv", newline="") as file,
        webdataset.TarWriter(str(shard)) as tar,
    ):
        for row in list(csv.reader(file, delimiter="\t"))[1:]:
            picture = (pictures / row[0]).read_bytes()
            tar.write({"__key__": row[0][:-4], "png": picture, "json": {"captions": row[1:]}})
    table = CaptionData.open(clip_data(pictures), "train", captions=None)
    tar = CaptionData.open({**clip_data(pictures), "train": str(shard)}, "train", captions=None)
    assert tar.texts == table.texts
    torch.manual_seed(1)
    first = table[3]
    torch.manual_seed(1)
    assert torch.equal(first[0], tar[3][0])
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError, match="is no WebDataset shard"):
        CaptionData.open({**clip_data(pictures), "train": str(shard)}, "train", captions=None)


def test_a_csv_is_read_like_a_tsv(pictures) -> None:
    text = (pictures / "captions.tsv").read_text().replace("\t", ",")
    (pictures / "captions.csv").write_text(text)
    data = {**clip_data(pictures), "train": str(pictures / "captions.csv")}
    ours = CaptionData.open(data, "train", captions=None)
    assert ours.texts == CaptionData.open(clip_data(pictures), "train", captions=None).texts
