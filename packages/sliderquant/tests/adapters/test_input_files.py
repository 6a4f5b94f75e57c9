"""Input files against the bytes and the records that the tests wrote."""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from effml_common.errors import InputError
from sliderquant.adapters.input_files import InputFiles, distinct_names
from sliderquant.adapters.text import read_documents

TEXTS = ["first", "second\u2028with\u2029other\x85breaks", "", "third \U0001f600"]
RECORDS = [{"text": text} for text in TEXTS]


def texts_of(path: Path | str) -> list[str]:
    (file,) = InputFiles().read([str(path)])
    return [record.value["text"] for record in file.records]


def lines_of(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "ndjson", "NdJson"])
def test_json_lines_are_records_by_any_spelling_of_their_ending(ending, tmp_path) -> None:
    path = tmp_path / f"data.{ending}"
    path.write_bytes(lines_of(RECORDS).encode())
    assert texts_of(path) == TEXTS
    path.write_bytes(b"\n  \n" + lines_of(RECORDS).replace("\n", "\r\n").encode() + b"\n")
    assert texts_of(path) == TEXTS
    path.write_bytes(lines_of(RECORDS).rstrip("\n").encode())  # the last line is not ended
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("ending", ["json", "JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_is_an_array_of_records_or_one_record(ending, indent, tmp_path) -> None:
    path = tmp_path / f"data.{ending}"
    path.write_text(json.dumps(RECORDS, indent=indent))
    assert texts_of(path) == TEXTS
    path.write_text(json.dumps(RECORDS[0], indent=indent))
    assert texts_of(path) == TEXTS[:1]


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes", "notes.py"])
def test_other_endings_are_one_text_as_it_is(name, tmp_path) -> None:
    text = "one\r\ntwo\u2028three\n\n"
    (tmp_path / name).write_bytes(text.encode())
    assert texts_of(tmp_path / name) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(name, tmp_path) -> None:
    content = "plain" if name == "a.txt" else '{"text": "plain"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts_of(tmp_path / name) == ["plain"]


def test_text_that_looks_like_records_is_pointed_out(tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text(lines_of(RECORDS))
    (tmp_path / "b.txt").write_text('{"data": 1}\n')
    (tmp_path / "c.txt").write_text("[1, 2]")
    (tmp_path / "d.txt").write_text(json.dumps(RECORDS, indent=1))
    assert texts_of(tmp_path / "a.txt") == [lines_of(RECORDS)]
    assert "a.txt is read as one plain text, but looks like JSON lines" in capsys.readouterr().err
    for name in ("b.txt", "c.txt"):
        texts_of(tmp_path / name)
        assert capsys.readouterr().err == ""
    texts_of(tmp_path / "d.txt")
    assert "looks like a JSON array; name it .json if it is" in capsys.readouterr().err


BAD = [
    ("a.jsonl", b'{"text": "x"}\n\n{]\n', "a.jsonl (line 3): no JSON ("),
    ("a.jsonl", b'{"text": 1}\n', "a.jsonl (line 1): neither 'text' nor 'messages'"),
    ("a.ndjson", b'\n"text"\n', "a.ndjson (line 2): neither 'text' nor 'messages'"),
    ("a.jsonl", b"[" * 200_000, "a.jsonl (line 1): JSON that cannot be read (maximum recursion"),
    (
        "a.jsonl",
        b'{"text": ' + b"9" * 5000 + b"}",
        "a.jsonl (line 1): JSON that cannot be read (Ex",
    ),
    ("a.json", b"[" * 200_000, "a.json: JSON that cannot be read (maximum recursion"),
    ("a.json", b'[{"text": "x"},\n\n {"text" "y"}]', "a.json (line 3): no JSON ("),
    ("a.json", b'{"text": "x"}\n{"text": "y"}\n', "or name it .jsonl if each line is one"),
    ("a.json", b'{"data": [{"text": "x"}]}', "a.json: neither 'text' nor 'messages'"),
    ("a.json", b'[{"text": "x"}, "y"]', "a.json (record 2): neither 'text' nor 'messages'"),
    ("a.json", b"", "a.json (line 1): no JSON ("),
    (
        "a.jsonl",
        b'{"messages": [{"from": "human", "value": "x"}]}',
        "a.jsonl (line 1): message 1 has no 'role'; give objects with",
    ),
    ("a.jsonl", b'{"messages": ["x"]}', "a.jsonl (line 1): message 1 has no 'role'"),
    (
        "a.json",
        b'[{"messages": [{"role": "a", "content": "x"}, {"role": "b", "content": null}]}]',
        "a.json (record 1): message 2 has no 'content'",
    ),
    ("a.json", b"7", "a.json: neither 'text' nor 'messages'"),
    ("a.txt", b"ab\ncd\xff\n", "a.txt (line 2): not UTF-8 text (invalid start byte); "),
    ("a.txt", b"ab\n\0cd", "a.txt (line 2): a zero byte"),
    ("a.txt", "text".encode("utf-16"), "a.txt is UTF-16 text, not UTF-8; save it as UTF-8"),
    ("a.jsonl", b"\xfe\xff\0{", "a.jsonl is UTF-16 text, not UTF-8"),
    ("a.txt", "text".encode("utf-32"), "a.txt is UTF-32 text, not UTF-8"),
    ("a.parquet", b"PAR1", "a.parquet: a file of the kind .parquet is not read as text; write"),
    (
        "a.CSV",
        b"text\nx\n",
        "a.CSV: a file of the kind .csv is not read as text; write its text as",
    ),
    (
        "a.jsonl.gz",
        b"\x1f\x8b",
        "a.jsonl.gz: a file of the kind .gz is not read as text; unpack it",
    ),
    (
        "a.pdf",
        b"%PDF",
        "a.pdf: a file of the kind .pdf is not read as text; give its text as a .txt",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_read_is_one_line_with_the_place(
    name, content, message, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        InputFiles().read([name])
    assert message in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_refused_where_several_processes_would_share_it(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="pipe is no file on a disk, and 2 processes read it; write"
    ):
        InputFiles().read([str(tmp_path / "pipe")])


def test_what_calls_a_tool_has_no_content(tmp_path) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (tmp_path / "a.json").write_text(json.dumps({"messages": [message]}))
    (file,) = InputFiles().read([str(tmp_path / "a.json")])
    assert file.records[0].value["messages"] == [message]


def test_missing_files_and_folders_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match="calib names a file without a name; give its path"):
        InputFiles().read([""], "calib")
    with pytest.raises(InputError, match=r"nowhere.txt cannot be read \(No such file or dir"):
        InputFiles().read([str(tmp_path / "nowhere.txt")])
    with pytest.raises(InputError, match="is a folder; give files"):
        InputFiles().read([str(tmp_path)])


@pytest.mark.parametrize("field", ["text", "messages"])
def test_half_a_character_is_named_with_its_line(field, loaded, tmp_path) -> None:
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    cut, whole = '"cut \\ud83d here"', '"all \\ud83d\\ude00 here"'
    if field == "messages":
        cut, whole = (f'[{{"role": "user", "content": {text}}}]' for text in (cut, whole))
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"{field}": {whole}}}\n')
    assert read_documents([str(path)], loaded.tokenizer) == ["all \U0001f600 here"]
    path.write_text(f'{{"{field}": {whole}}}\n\n{{"{field}": {cut}}}\n')
    with pytest.raises(InputError, match=r"a.jsonl \(line 3\): '\\ud83d' is half of a character;"):
        read_documents([str(path)], loaded.tokenizer)


@pytest.mark.parametrize("first", [b"", b"\xef\xbb\xbf"])
def test_hash_and_size_are_those_of_what_was_read(first, tmp_path) -> None:
    data = first + b"some text\r\n"
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    inputs = InputFiles()
    (file,) = inputs.read([str(path)])

    # What becomes of the file later changes nothing.
    path.unlink()
    (again,) = inputs.read([str(path)])
    for read in (file, again):
        assert (read.sha256, read.size) == (hashlib.sha256(data).hexdigest(), len(data))
        assert read.records[0].value["text"] == "some text\r\n"


def test_a_pipe_is_read_once_for_all_settings(tmp_path) -> None:
    # A pipe gives its bytes once; bash writes <(cat f) as /dev/fd/63.
    source, sink = os.pipe()
    data = b"through a pipe\n" * 10_000  # more than a pipe holds
    writer = threading.Thread(target=lambda: [os.write(sink, data), os.close(sink)])
    writer.start()
    inputs = InputFiles()
    (calib,) = inputs.read([f"/dev/fd/{source}"], "calib")
    (text,) = inputs.read([f"/dev/fd/{source}"], "eval_text")
    writer.join()
    os.close(source)
    for read in (calib, text):
        assert read.records[0].value["text"].encode() == data
        assert read.sha256 == hashlib.sha256(data).hexdigest()
    assert calib.name == str(source)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.txt"], ["x.txt"]),
        (["a/x.txt", "b/x.txt"], ["a/x.txt", "b/x.txt"]),
        (["a/x.txt", "b/x.txt", "b/y.txt"], ["a/x.txt", "b/x.txt", "y.txt"]),
        (["/1/a/x", "/2/a/x", "/2/b/x"], ["1/a/x", "2/a/x", "b/x"]),
        (["/x", "/a/x"], ["x", "a/x"]),
        (["hf:a/x:train", "hf:b/x:train", "x:train"], ["hf:a/x:train", "hf:b/x:train", "x:train"]),
    ],
)
def test_names_have_the_fewest_folders_that_tell_them_apart(paths, names) -> None:
    assert distinct_names(paths) == names
    assert len(set(names)) == len(names)
    assert not any(os.path.isabs(name) for name in names)


def test_files_of_two_settings_are_told_apart_and_the_same_file_has_one_name(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    first, second = (str(tmp_path / name / "x.txt") for name in ("a", "b"))
    inputs = InputFiles()
    assert [f.name for f in inputs.read([first], beside=[second])] == ["a/x.txt"]
    assert [f.name for f in inputs.read([second, first], beside=[first])] == ["b/x.txt", "a/x.txt"]
    assert [f.name for f in inputs.read([first], beside=[first])] == ["x.txt"]


def test_a_file_beside_one_in_a_folder_is_told_apart(tmp_path, monkeypatch) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for path in ("x.txt", "a/x.txt"):
        Path(path).write_text(path)
    first, second = InputFiles().read(["x.txt", "a/x.txt"])
    assert (first.name, second.name) == ("here/x.txt", "a/x.txt")
    assert [file.records[0].value["text"] for file in (first, second)] == ["x.txt", "a/x.txt"]


@pytest.mark.parametrize("other", ["x.txt", "./x.txt", "link.txt", "~/x.txt"])
def test_the_very_same_file_twice_is_refused(other, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("x.txt").write_text("text")
    Path("link.txt").symlink_to("x.txt")
    with pytest.raises(InputError, match=r"calib names \S+ twice.*; give it once"):
        InputFiles().read(["x.txt", other], "calib")


def test_the_home_folder_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("at home")
    assert texts_of("~/x.txt") == ["at home"]


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Makes data sets, with the hub out of reach and caches of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return datasets.Dataset.from_dict


def test_a_saved_data_set_is_a_folder_to_read(data_set) -> None:
    data_set({"id": [1, 2, 3, 4], "text": TEXTS}).save_to_disk("saved")
    (file,) = InputFiles().read(["saved"])
    assert [record.value for record in file.records] == RECORDS
    assert file.name == "saved"

    # The hash is that of the records as JSON lines.
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    assert (file.sha256, file.size) == (hashlib.sha256(lines).hexdigest(), len(lines))


def test_chats_of_a_saved_data_set_go_through_the_template(data_set, loaded) -> None:
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    chats = [[{"role": "user", "content": "hi"}], [{"role": "tool", "content": "ho"}]]
    data_set({"messages": chats}).save_to_disk("saved")
    assert read_documents(["saved"], loaded.tokenizer) == ["<user>hi", "<tool>ho"]


def test_saved_data_sets_that_do_not_fit_are_one_line(data_set) -> None:
    import datasets

    data = data_set({"sentence": TEXTS})
    data.save_to_disk("other")
    with pytest.raises(InputError, match="other has the columns sentence; give one with 'text'"):
        InputFiles().read(["other"])
    datasets.DatasetDict(train=data, test=data).save_to_disk("splits")
    with pytest.raises(InputError, match="splits holds the splits test, train; give the folder"):
        InputFiles().read(["splits"])
    with pytest.raises(
        InputError, match="other is a folder that save_to_disk wrote; leave out hf:"
    ):
        InputFiles().read(["hf:other"])
    next(Path("other").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"other cannot be read .*; save it again") as caught:
        InputFiles().read(["other"])
    assert "\n" not in str(caught.value)
    data_set({"text": ["x", None]}).save_to_disk("holes")
    with pytest.raises(InputError, match=r"holes \(row 2\): neither 'text' nor 'messages'"):
        InputFiles().read(["holes"])


@pytest.fixture
def shelf(data_set) -> None:
    """The data set shelf/code with two splits, and a config of its own, as load_dataset finds it."""
    folder = Path("shelf/code")
    folder.mkdir(parents=True)
    for split, records in (("train", RECORDS), ("test", RECORDS[:1])):
        (folder / f"{split}.jsonl").write_text(lines_of(records))
    (folder / "small.jsonl").write_text(lines_of(RECORDS[1:2]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: whole\n  default: true\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: small\n  data_files:\n  - {split: train, path: small.jsonl}\n---\n"
    )


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("hf:shelf/code", TEXTS),
        ("hf:shelf/code:train", TEXTS),
        ("hf:shelf/code:test", TEXTS[:1]),
        ("hf:shelf/code:train[1:3]", TEXTS[1:3]),
        ("hf:shelf/code/small", TEXTS[1:2]),
        ("hf:shelf/code/small:train", TEXTS[1:2]),
    ],
)
def test_names_of_data_sets_are_read_by_their_library(name, texts, shelf) -> None:
    assert texts_of(name) == texts


def test_a_second_part_may_be_the_config(shelf) -> None:
    Path("shelf/code").rename("code")
    assert texts_of("hf:code/small") == TEXTS[1:2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:nobody/nothing:train", "cannot be read .*; check the name, or load it once where"),
        ("hf:nothing", "cannot be read .*; check the name, or load it once where"),
        ("hf:shelf/code:missing", "cannot be read .*missing.*; check name, config and split"),
        ("hf:shelf/code/large", "cannot be read .*large.*; check name, config and split"),
        ("hf:", "is no name of a data set; write hf:NAME/CONFIG:SPLIT"),
        ("hf:a/b/c/d", "is no name of a data set"),
    ],
)
def test_data_sets_that_are_not_there_are_one_line(name, message, shelf) -> None:
    with pytest.raises(InputError, match=message) as caught:
        InputFiles().read([name])
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


def test_a_path_that_exists_wins_over_a_name(shelf) -> None:
    Path("hf:shelf").write_text("a file")
    assert texts_of("hf:shelf") == ["a file"]


def test_without_the_library_a_name_says_what_to_install(shelf, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets library; pip install 'sliderquant"):
        InputFiles().read(["hf:shelf/code"])
