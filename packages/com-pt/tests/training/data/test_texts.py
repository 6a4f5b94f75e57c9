"""Blocks of text, compared with the whole text as a list."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from com_pt.training.data.texts import MappedBytes, TextBlocks
from com_pt.training.tasks.causal_lm import CausalLMTask
from effml_common.errors import ConfigError, InputError

CONTENTS = {"a.txt": b"hello", "b.txt": b"", "c.txt": bytes(range(256)) * 3, "d.txt": b"\xff\x00"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def expected_blocks(length: int) -> list[list[int]]:
    row = [token for content in CONTENTS.values() for token in [*content, 256]]
    return [row[i : i + length] for i in range(0, len(row) - length + 1, length)]


@pytest.mark.parametrize("length", [1, 3, 6, 7, 100, 779])
def test_blocks_of_bytes_are_those_of_the_whole_text(files, length) -> None:
    blocks = TextBlocks.open({"train": f"{files}/*.txt"}, "train", length)
    assert [blocks[i].tolist() for i in range(len(blocks))] == expected_blocks(length)
    assert blocks[:].tolist() == expected_blocks(length)
    assert blocks[1:2].tolist() == expected_blocks(length)[1:2]
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_many_files_are_mapped_a_few_at_a_time(files, monkeypatch) -> None:
    monkeypatch.setattr("com_pt.training.data.texts.MOST_MAPPED", 1)
    blocks = TextBlocks.open({"train": f"{files}/*.txt"}, "train", 7)
    assert blocks[:].tolist() == expected_blocks(7)


def test_bytes_stay_on_disk(tmp_path) -> None:
    # A file of 64 MiB with holes: another process is sent its name, and a block is a part of it.
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(2**26)
        file.seek(2**25)
        file.write(b"mark")
    mapped = MappedBytes([tmp_path / "large.txt"])
    assert mapped.read(2**25 - 1, 2**25 + 5).tolist() == [0, *b"mark", 0]
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000
    assert pickle.load(io.BytesIO(sent)).read(2**25, 2**25 + 4).tolist() == [*b"mark"]
    assert len(mapped) == 2**26 + 1


def test_the_order_is_that_of_names_however_they_are_given(files) -> None:
    paths = [f"{files}/d.txt", f"{files}/{{c,a,b}}.txt", f"{files}/a.txt"]
    task = CausalLMTask({"train": paths, "length": 7})
    assert [task[i].tolist() for i in range(len(task))] == expected_blocks(7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no train data are given; name text files under data: train"),
        ({"train": "{}/*.md"}, r"no file matches .*\*\.md; check data: train"),
        ({"train": "{}/gone.txt"}, r"gone\.txt is not there; check data: train"),
        ({"train": "{}/b.txt"}, "the text has 1 tokens, fewer than a block of 512; add text"),
        ({"train": "{}"}, "Is a directory; check the path"),
        ({"train": "{}/a.txt", "tokenizer": "gone"}, "there is no tokenizer gone; use bytes or a"),
    ],
)
def test_text_that_cannot_be_read_is_one_line(files, data, message) -> None:
    if "train" in data:
        data = {**data, "train": data["train"].format(files)}
    with pytest.raises(InputError, match=message):
        len(CausalLMTask(data))


@pytest.fixture
def tokenizer(tmp_path) -> Any:
    """The folder of a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[end]", "a", "b", "c"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[end]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[end]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokens_are_those_of_the_tokenizer_in_32_bits(tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b\r\nc a")
    (tmp_path / "b.txt").write_text("b")
    data = {"train": f"{tmp_path}/?.txt", "tokenizer": str(tokenizer)}
    blocks = TextBlocks.open(data, "train", 2)
    assert blocks[:].tolist() == [[1, 2], [3, 1], [0, 2]]
    assert blocks[0].dtype == torch.int64
    assert blocks.tokens.ids.dtype == torch.int32  # pyright: ignore
    (tmp_path / "b.txt").write_bytes(b"b\nb\xe9\n")
    with pytest.raises(InputError, match=r"b\.txt, row 2: the text is not UTF-8 \(byte 0xE9\)"):
        TextBlocks.open(data, "train", 2)


def test_a_damaged_tokenizer_is_one_line_and_its_code_is_never_run(tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a b")
    config = '{"auto_map": {"AutoTokenizer": ["code.Own", null]}, "tokenizer_class": "Own"}'
    (tokenizer / "tokenizer_config.json").write_text(config)
    (tokenizer / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tokenizer / "tokenizer.json").write_text("{")
    data = {"train": f"{tmp_path}/a.txt", "tokenizer": str(tokenizer)}
    with pytest.raises(InputError, match=r"the tokenizer .*/tokenizer: .*; check the folder"):
        TextBlocks.open(data, "train", 2)
    assert not (tmp_path / "ran").exists()


def test_two_stars_are_folders_at_any_depth(files) -> None:
    (files / "one" / "two").mkdir(parents=True)
    (files / "one" / "two" / "e.txt").write_text("deep")
    task = CausalLMTask({"train": f"{files}/**/*.txt", "length": 2})
    assert len(task) == (len(expected_blocks(1)) + 5) // 2


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tokenizer) -> None:
    task = CausalLMTask({"tokenizer": str(tokenizer)})
    task.adopt({"A": {"vocab_size": 4}})
    with pytest.raises(
        ConfigError, match=r"vocab_size of A is 3 and the tokenizer .* has 4; raise"
    ):
        task.adopt({"A": {"vocab_size": 3}})
