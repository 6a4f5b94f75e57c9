"""Captions from tables, tars and data sets, and what is wrong with them."""

import csv
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from com_pt_tiny import clip_chain, clip_data, task_of

from com_pt.training.chain import parse_chain
from com_pt.training.data.captions import CaptionData
from com_pt.training.run import run_chain
from effml_common.errors import ConfigError, InputError


def pairs_of(folder: Path, **more: Any) -> CaptionData:
    return CaptionData.open(clip_data(folder, **more), "train", captions=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header with a path and captions; add one, separated by commas or tabs"),
        ("path;one\n0.png;red\n", "no header with a path and captions"),
        ("path\tone\n", "holds no samples; give a file with some"),
        ("path\tone\n0.png\tred\textra\n", "row 2: 3 columns, not 2; correct the row"),
        ("path\tone\n0.png\tred\nnone.png\tred\n", r"row 3: none\.png is not there"),
        ("path\tone\n0.png\t \n", "row 2: no caption; add one, or leave the image out"),
        ("path\tone\nhttp://x.org/0.png\tred\n", "row 2: http://x.org/0.png is an address; down"),
    ],
)
def test_a_wrong_table_names_its_row(pictures, content, message) -> None:
    (pictures / "captions.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        len(task_of(pictures, captions=1))


def test_images_with_too_few_captions_are_refused(pictures) -> None:
    with pytest.raises(InputError, match=r"tsv, row 2: 2 captions, but 3 are drawn for each image"):
        len(task_of(pictures, captions=3))


def test_tabs_need_no_quotes(pictures) -> None:
    captions = [f"caption {i}" for i in range(8)]
    captions[2], captions[5] = '"Lone quote at the beginning', '"Another one'
    captions[6], captions[7] = '"a "quoted" word"', '5" of "snow"'
    rows = "".join(f"{i}.png\t{text}\n" for i, text in enumerate(captions))
    (pictures / "captions.tsv").write_text(f"path\tone\n{rows}")
    assert [text for (text,) in pairs_of(pictures).texts] == captions


def test_a_table_that_a_csv_writer_wrote_with_tabs_loses_its_quotes(pictures) -> None:
    captions = ['he says "hi"', "plain", 'five"', '"', "a, b"]
    with open(pictures / "captions.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["path", "one"])
        writer.writerows([f"{i}.png", text] for i, text in enumerate(captions))
    assert [text for (text,) in pairs_of(pictures).texts] == captions


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.png,red", '1.png,"a', "2.png,blue", '3.png,b"'], r"row 3: a quoted cell runs on to r"),
        (["0.png,red", '1.png,"never closed', "2.png,blue"], r"row 3: .*; double or remove"),
        (["0.png,red", '1.png,"a "quoted" word"'], r"row 3: .*; double or remove"),
        (['0.png,"red\nand blue"'], "row 2: a quoted cell runs on to row 3; close the quote"),
    ],
)
def test_a_cell_of_several_lines_is_refused_instead_of_swallowing_rows(
    pictures, rows, message
) -> None:
    (pictures / "c.csv").write_text("\n".join(["path,one", *rows]) + "\n")
    with pytest.raises(InputError, match=message):
        pairs_of(pictures, train=str(pictures / "c.csv"))


def test_a_csv_is_read_like_a_tsv(pictures) -> None:
    text = (pictures / "captions.tsv").read_text().replace("\t", ",")
    (pictures / "captions.csv").write_text(text)
    commas = pairs_of(pictures, train=str(pictures / "captions.csv"))
    assert [*commas.texts] == [*pairs_of(pictures).texts]
    assert len(commas) == 48


def test_paths_may_be_absolute_or_climb_up(pictures) -> None:
    (pictures / "tables").mkdir()
    table = pictures / "tables" / "c.csv"
    table.write_text(f"path,one\n{pictures / '0.png'},red\n../1.png,green\n")
    opened = pairs_of(pictures, train=str(table))
    expected = pairs_of(pictures)
    assert all(torch.equal(opened.image(i), expected.image(i)) for i in range(2))


def test_only_some_pictures_of_a_long_table_are_looked_for(pictures, monkeypatch) -> None:
    monkeypatch.setattr("com_pt.training.data.tables.ROWS_CHECKED", 10)
    rows = [f"{i % 48}.png\ta" for i in range(40)]

    def write(row: int) -> None:
        changed = [*rows]
        changed[row - 2] = "gone.png\ta"
        (pictures / "captions.tsv").write_text("\n".join(["path\tone", *changed]) + "\n")

    for row in (10, 20, 30):
        write(row)
        with pytest.raises(InputError, match=rf"row {row}: gone\.png is not there"):
            pairs_of(pictures)
    write(11)
    opened = pairs_of(pictures)
    with pytest.raises(InputError, match=r"gone\.png: No such file or directory; check the path"):
        opened.image(9)


def tar_of(path: Path, members: dict[str, bytes | str], *, repeat: str = "") -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in [*members.items(), *((n, members[n]) for n in members if n == repeat)]:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture
def png(pictures) -> bytes:
    return (pictures / "0.png").read_bytes()


def test_shards_are_read_as_the_library_webdataset_wrote_them(pictures, tmp_path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shard = tmp_path / "shard-000000.tar"
    with (
        open(pictures / "captions.tsv", newline="") as file,
        webdataset.TarWriter(str(shard)) as tar,
    ):
        for row in list(csv.reader(file, delimiter="\t"))[1:]:
            picture = (pictures / row[0]).read_bytes()
            tar.write({"__key__": row[0][:-4], "png": picture, "json": {"captions": row[1:]}})
    table, tar = pairs_of(pictures), pairs_of(pictures, train=str(shard))
    assert [*tar.texts] == [*table.texts]
    for i in range(48):
        torch.manual_seed(1)
        first = table[i]
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(first, tar[i], strict=True))


def test_texts_of_a_shard_come_from_where_img2dataset_and_others_put_them(tmp_path, png) -> None:
    members = {
        "a.jpg": png, "a.txt": "a red square\n\n a square \n", "a.json": '{"width": 3}',
        "b.png": png, "b.json": '{"caption": "a picture", "captions": null}', "b.txt": "red",
        "deep/c.PNG": png, "deep/c.json": '{"captions": ["green", "blue"], "caption": "no"}',
        "../../d.webp": png, "../../d.json": '{"caption": "a square"}',
        "/e.jpeg": png, "/e.txt": "\ufeffa café",
    }  # fmt: skip
    opened = pairs_of(tmp_path, train=tar_of(tmp_path / "x.tar", members))
    expected = [
        ["a red square", " a square "],
        ["red"],
        ["green", "blue"],
        ["a square"],
        ["a café"],
    ]
    assert [*opened.texts] == expected
    assert opened.image(3).shape == (3, 8, 16)
    assert not (tmp_path.parent.parent / "d.webp").exists()
    named = {"f.png": png, "f.txt": "red", "f.json": '{"alt": ["green"]}'}
    file = tar_of(tmp_path / "y.tar", named)
    assert [*pairs_of(tmp_path, train=file, caption_key="alt").texts] == [["green"]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": '{"caption": null}'}, "sample a: caption is null; give a text or a list of te"),
        ({"a.json": '{"caption": 7}'}, "sample a: caption is 7; give a text"),
        ({"a.json": '{"captions": ["x", null]}'}, r'sample a: captions is \["x", null\]; give a t'),
        ({"a.json": '{"captions": {"x": 1}}'}, r"sample a: captions is \{.*; give a text"),
        ({"a.json": '{"captions": []}'}, "sample a: no caption; add one"),
        ({"a.json": '{"caption": " "}'}, "sample a: no caption; add one"),
        (
            {"a.json": '{"width": 3}'},
            'sample a: the json has no "caption"; add a .txt file or name',
        ),
        ({"a.json": '["x"]'}, "sample a: the json is no object with fields"),
        ({"a.json": "{"}, "sample a: no JSON: .*; correct it"),
        ({"a.json": b'{"caption": "\xe9"}'}, r"sample a: the text is not UTF-8 \(byte 0xE9\)"),
        ({"a.json": "[" * 100000}, "sample a: no JSON: .*recursion"),
        ({"a.txt": " \n\n"}, "sample a: no caption; add one"),
        ({"a.txt": b"caf\xe9"}, r"sample a: the text is not UTF-8 \(byte 0xE9\)"),
        ({}, "sample a: no caption; add a .txt or .json file"),
        ({"a.jpg": "x", "a.txt": "red"}, "sample a: two images; give each sample a name"),
    ],
)
def test_a_wrong_sample_of_a_shard_is_named_at_opening(tmp_path, png, members, message) -> None:
    good = {"good.png": png, "good.txt": "red"}
    file = tar_of(tmp_path / "x.tar", {**good, "a.png": png, **members})
    with pytest.raises(InputError, match=rf"x\.tar, {message}"):
        pairs_of(tmp_path, train=file)


def test_names_that_repeat_in_a_shard_are_refused(tmp_path, png) -> None:
    file = tar_of(tmp_path / "x.tar", {"a.png": png, "a.txt": "red"}, repeat="a.txt")
    with pytest.raises(InputError, match=r"sample a: two files \.txt; give each sample a name"):
        pairs_of(tmp_path, train=file)


def test_a_field_that_no_json_has_is_named(tmp_path, png) -> None:
    file = tar_of(tmp_path / "x.tar", {"a.png": png, "a.txt": "red"})
    with pytest.raises(InputError, match='sample a: no json has the field "alt"; change caption_k'):
        pairs_of(tmp_path, train=file, caption_key="alt")


def test_images_of_another_kind_are_counted_or_refused(tmp_path, png, capsys) -> None:
    members = {"a.png": png, "a.txt": "red", "b.gif": "x", "b.txt": "red", "README.txt": "notes"}
    assert len(pairs_of(tmp_path, train=tar_of(tmp_path / "x.tar", members))) == 1
    kinds = ".jpg, .jpeg, .png, .webp, .bmp"
    warning = (
        f"x.tar: 2 of 3 samples have no image ({kinds}), such as b, only .gif; they are left out"
    )
    assert warning in capsys.readouterr().err
    file = tar_of(tmp_path / "x.tar", {"b.gif": "x", "b.txt": "red"})
    with pytest.raises(InputError, match=r"1 of 1 samples have no image.*; convert the images"):
        pairs_of(tmp_path, train=file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: tar[:3000], "no complete tar: unexpected end of data; copy it or make it"),
        (
            lambda tar: tar[:1024] + b"x" + tar[1025:],
            "no complete tar: a header is damaged, or two",
        ),
        (lambda tar: tar + tar, "no complete tar: .*two tars are joined, at byte"),
        (lambda tar: b"no tar at all" * 99, "no complete tar: .*; copy it or make it again"),
        (lambda tar: b"", "no complete tar: .*empty.*; copy it or make it again"),
    ],
)
def test_a_damaged_tar_is_refused(tmp_path, png, damage, message) -> None:
    path = tmp_path / "x.tar"
    tar_of(path, {"a.png": png[:100], "a.txt": "red", "b.png": png, "b.txt": "red" * 300})
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(InputError, match=rf"x\.tar: {message}"):
        pairs_of(tmp_path, train=str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.csv", r"gone\.csv is not there; check data: train"),
        ("shard.tar.gz", r"shard\.tar\.gz is compressed; unpack it"),
        ("photos", "is a folder without captions; name its table or tars"),
    ],
)
def test_a_source_of_another_kind_is_refused(tmp_path, name, message) -> None:
    (tmp_path / "shard.tar.gz").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=message):
        pairs_of(tmp_path, train=str(tmp_path / name))


def test_held_out_files_are_looked_at_before_training(pictures) -> None:
    (pictures / "val.tsv").write_text("path\tone\ngone.png\tred\n")
    document = clip_chain(pictures, 32)
    document["data"]["val"] = str(pictures / "val.tsv")
    with pytest.raises(InputError, match=r"val\.tsv, row 2: gone\.png is not there"):
        run_chain(parse_chain(document), pictures / "out")
    assert not (pictures / "out").exists()

    (pictures / "val.csv").write_text("path,class\n0.png,red\n1.png,mauve\n")
    settings = {"images": str(pictures / "val.csv"), "classes": ["red"], "templates": ["a {}"]}
    for change, message in (
        ({}, r"val\.csv, row 3: the label 'mauve' is no class; correct it or add it to classes"),
        (
            {"classes": ["red", "mauve"], "templates": ["a red"]},
            "the template 'a red' has no place",
        ),
        ({"classes": []}, "zero_shot has no classes; set data: zero_shot: classes"),
    ):
        document["data"] = clip_data(pictures, zero_shot={**settings, **change})
        with pytest.raises(InputError, match=message):
            run_chain(parse_chain(document), pictures / "out")


def test_captions_of_a_data_set_are_read_from_its_columns(pictures) -> None:
    datasets = pytest.importorskip("datasets")
    table = pairs_of(pictures)
    rows = {
        "photo": [{"bytes": (pictures / f"{i}.png").read_bytes(), "path": None} for i in range(48)],
        "alt": [texts[0] for texts in table.texts],
        "more": [[texts[1], texts[0]] for texts in table.texts],
        "id": [*range(48)],
    }
    datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).save_to_disk(
        str(pictures / "saved")
    )
    source = {"train": f"hf:{pictures}/saved"}
    opened = pairs_of(pictures, **source, caption_key=["alt", "more"])
    assert [*opened.texts] == [[a, b, a] for a, b in table.texts]
    torch.manual_seed(1)
    image = opened.image(7)
    torch.manual_seed(1)
    assert torch.equal(image, table.image(7))
    with pytest.raises(
        InputError, match=r"caption; set data: caption_key to one of photo, alt, mo"
    ):
        pairs_of(pictures, **source)
    with pytest.raises(InputError, match=r"saved, row 0: the caption is 0, no text; name another"):
        pairs_of(pictures, **source, caption_key="id")


def test_a_field_of_json_is_no_setting_of_tables(pictures) -> None:
    with pytest.raises(
        ConfigError, match=r"caption_key is alt, but all columns of .* are captions"
    ):
        pairs_of(pictures, caption_key="alt")


def test_a_table_that_begins_with_a_picture_has_no_header(pictures) -> None:
    (pictures / "captions.tsv").write_text("0.png\tred\n1.png\tred\n")
    with pytest.raises(
        InputError, match=r"row 1: 0\.png is a picture, and the first row is the he"
    ):
        pairs_of(pictures)


def test_images_whose_names_have_more_dots_are_refused_instead_of_dropped(tmp_path, png) -> None:
    members = {"a.png": png, "a.txt": "red", "b_0.5.png": png, "b_0.5.txt": "red"}
    with pytest.raises(InputError, match=r"1 images have a dot within their names, such as b_0\.5"):
        pairs_of(tmp_path, train=tar_of(tmp_path / "x.tar", members))


def test_a_tar_that_was_cut_between_two_members_is_refused(tmp_path, png) -> None:
    path = tmp_path / "x.tar"
    tar_of(path, {"a.png": png, "a.txt": "red", "b.png": png, "b.txt": "red"})
    with tarfile.open(path) as tar:
        end = tar.getmember("b.png").offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(InputError, match=r"x\.tar: no complete tar: its end is missing"):
        pairs_of(tmp_path, train=str(path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, r"b\.png is a hard link"),
        (tarfile.GNUTYPE_SPARSE, r"b\.png is sparse"),
    ],
)
def test_members_that_are_not_stored_as_they_are_are_refused(tmp_path, png, kind, message) -> None:
    path = tmp_path / "x.tar"
    tar_of(path, {"a.png": png, "a.txt": "red"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = kind, "a.png"
        tar.addfile(member)
    with pytest.raises(InputError, match=message):
        pairs_of(tmp_path, train=str(path))


def test_patterns_of_tables_are_read_without_being_streamed(pictures) -> None:
    (pictures / "more.tsv").write_text((pictures / "captions.tsv").read_text())
    task = task_of(pictures, train=f"{pictures}/{{captions,more}}.tsv")
    assert (len(task), task.stream) == (96, None)
    with pytest.raises(ConfigError, match="samples is 8, but the training data are not streamed"):
        len(task_of(pictures, samples=8))


def test_a_damaged_picture_in_a_tar_is_named_by_its_sample(tmp_path, png) -> None:
    members = {"a.png": png, "a.txt": "red", "deep/b.png": png[:40], "deep/b.txt": "red"}
    path = tmp_path / "x.tar"
    opened = pairs_of(tmp_path, train=tar_of(path, members))
    with pytest.raises(InputError, match=r"x\.tar, sample deep/b: .*; replace the picture"):
        opened.image(1)

    # The file may change while it is in use.
    path.write_bytes(path.read_bytes()[:540])
    with pytest.raises(InputError, match=r"x\.tar, sample a: the file has become shorter; check"):
        opened.image(0)
    path.unlink()
    with pytest.raises(InputError, match=r"x\.tar: No such file or directory; check the path"):
        opened.image(1)


def test_shadows_of_macos_are_no_samples(tmp_path, png) -> None:
    members = {"a.png": png, "a.txt": "red", "._a.png": "x", "__MACOSX/._a.txt": b"\xff"}
    assert len(pairs_of(tmp_path, train=tar_of(tmp_path / "x.tar", members))) == 1
