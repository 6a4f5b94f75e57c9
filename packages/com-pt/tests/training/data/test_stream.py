"""Shards that are visited one after the other: their order, and what a resumed run sees."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from com_pt_tiny import clip_chain, clip_data
from PIL import Image
from torch import Tensor

from com_pt.training.chain import parse_chain
from com_pt.training.data.loading import Batches
from com_pt.training.data.patterns import expand_paths
from com_pt.training.data.stream import ShardStream, shuffle_through_buffer
from com_pt.training.run import run_chain
from com_pt.training.tasks.clip import ClipTask
from effml_common.errors import InputError

SHARDS, SAMPLES = 6, 16  # of a shard
WORDS = ["raw", *"abcdefgh"]
SENTENCES = "a. b. c. d. e. f. g. h"
BATCH = 8


def write_shard(path: Path, shard: int, samples: int = SAMPLES) -> None:
    """Write pictures whose colour is (shard, number, 0), each with a raw caption and sentences."""
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            picture = io.BytesIO()
            Image.new("RGB", (18, 10), (shard, number, 0)).save(picture, "PNG")
            record = json.dumps({"captions": ["raw", SENTENCES]}).encode()
            for extension, content in ((".png", picture.getvalue()), (".json", record)):
                member = tarfile.TarInfo(f"{shard:03}{number:05}{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    for shard in range(SHARDS):
        write_shard(tmp_path / "shards" / f"{shard:05}.tar", shard)
    return tmp_path / "shards"


def task_of(shards: Path, **more: Any) -> ClipTask:
    source = f"{shards}/{{00000..0000{SHARDS - 1}}}.tar"
    settings = {"tokenizer": WORDS, "captions": 4, "sentences": True, "shuffle_buffer": 20}
    return ClipTask({**clip_data(shards, train=source), **settings, **more})


def batches_of(task: ClipTask, start: int, stop: int, **how: int) -> list[tuple[Tensor, Tensor]]:
    return list(Batches(task, BATCH, seed=3, **how).run(start, stop))


def numbers_of(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Shard and number of each sample, from its colour."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pixels = torch.cat([images for images, _ in batches])[:, :2, 0, 0]
    mean, deviation = torch.tensor(OPENAI_DATASET_MEAN[:2]), torch.tensor(OPENAI_DATASET_STD[:2])
    colours = ((pixels * deviation + mean) * 255).round().int().tolist()
    return [(shard, number) for shard, number in colours]


def equal(some: Any, others: Any) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(shards) -> None:
    task = task_of(shards)
    assert len(task) == SHARDS * SAMPLES
    updates = SHARDS * SAMPLES // BATCH
    numbers = numbers_of(batches_of(task, 0, 2 * updates))
    first, second = numbers[: updates * BATCH], numbers[updates * BATCH :]
    everything = [(shard, number) for shard in range(SHARDS) for number in range(SAMPLES)]
    assert sorted(first) == sorted(second) == everything
    assert first != second

    # Shards come in an order of their own; the first draws are among the first 20 + 8 samples.
    met = list(dict.fromkeys(shard for shard, _ in first))
    assert met != sorted(met)
    assert len({shard for shard, _ in first[:BATCH]}) == 2
    assert [number for _, number in first] != [number for _, number in sorted(first)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(shards, workers) -> None:
    for rank in range(2):
        how = {"rank": rank, "world": 2}
        whole = batches_of(task_of(shards), 0, 20, workers=0, **how)
        for start in (5, 12, 17):  # the middle of an epoch, its end, the middle of the next
            later = batches_of(task_of(shards), start, 20, workers=workers, **how)
            assert equal(later, whole[start:])
        assert not equal(whole[:1], whole[1:2])


def test_two_processes_share_the_shards_of_an_epoch(shards) -> None:
    task = task_of(shards)
    ranks = [numbers_of(batches_of(task, 0, 12, rank=rank, world=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(numbers_of(batches_of(task, 0, 12)))
    assert not {shard for shard, _ in ranks[0]} & {shard for shard, _ in ranks[1]}
    with pytest.raises(
        InputError, match="6 shards cannot be dealt to 8 processes; make more shards"
    ):
        batches_of(task, 0, 1, rank=0, world=8)


def test_a_process_with_fewer_samples_begins_its_shards_again(shards) -> None:
    for shard in (1, 3, 5):
        write_shard(shards / f"{shard:05}.tar", shard, samples=4)
    for rank in range(2):
        numbers = numbers_of(batches_of(task_of(shards), 0, 7, rank=rank, world=2))
        assert len(numbers) == 28
        mine = {shard for shard, _ in numbers}
        assert len(mine) == 3
    assert len(task_of(shards)) == 60


@pytest.mark.parametrize("workers", [0, 1])
def test_three_shards_on_two_processes_make_the_same_number_of_updates(shards, workers) -> None:
    task = task_of(shards, train=f"{shards}/{{00000..00002}}.tar")
    updates = Batches(task, BATCH, seed=3).per_epoch
    assert updates == 3 * SAMPLES // BATCH
    ranks = [
        numbers_of(batches_of(task, 0, 2 * updates, rank=rank, world=2, workers=workers))
        for rank in range(2)
    ]
    assert [len(numbers) for numbers in ranks] == [2 * updates * BATCH // 2] * 2

    # In an epoch one process sees two shards, not quite to their end, and the other its only one again.
    half = updates * BATCH // 2
    met = [{shard for shard, _ in numbers[:half]} for numbers in ranks]
    assert sorted(map(len, met)) == [1, 2]
    assert not met[0] & met[1]
    lone = next(numbers for numbers, seen in zip(ranks, met, strict=True) if len(seen) == 1)
    assert len({*lone[:SAMPLES]}) == len({*lone[:half]}) == SAMPLES


def test_skipping_opens_no_shard_whose_size_is_known(shards, monkeypatch) -> None:
    sizes = {f"{shard:05}.tar": SAMPLES for shard in range(SHARDS)}
    (shards / "sizes.json").write_text(json.dumps(sizes))
    expected = batches_of(task_of(shards), 11, 12)
    task = task_of(shards)
    assert len(task) == SHARDS * SAMPLES
    opened: list[int] = []
    index = ShardStream.index
    monkeypatch.setattr(
        ShardStream, "index", lambda self, shard: (opened.append(shard), index(self, shard))[1]
    )
    assert equal(batches_of(task, 11, 12), expected)
    assert 0 < len(opened) <= BATCH


def test_the_size_of_an_epoch_comes_from_where_open_clip_puts_it(shards, monkeypatch) -> None:
    monkeypatch.setattr("com_pt.training.data.shard_cache.scan_shard", refuse_after(1))
    (shards / "__len__").write_text("96\n")
    assert len(task_of(shards)) == 96
    assert len(task_of(shards, samples=40)) == 40
    (shards / "__len__").unlink()
    (shards / "sizes.json").write_text('{"00000.tar": "many"}')
    with pytest.raises(
        InputError, match=r"sizes\.json: no numbers of samples by shard; correct it"
    ):
        len(task_of(shards))


def refuse_after(scans: int) -> Any:
    """The real scan, which may be called a number of times."""
    from com_pt.training.data.shards import scan_shard

    left = iter(range(scans))

    def scan(path: Path) -> Any:
        assert next(left, None) is not None, f"{path} is scanned again"
        return scan_shard(path)

    return scan


def test_headers_are_counted_once(shards, monkeypatch, capsys) -> None:
    monkeypatch.setattr("com_pt.training.data.shard_cache.scan_shard", refuse_after(SHARDS + 1))
    for _ in range(3):
        assert len(task_of(shards)) == SHARDS * SAMPLES
    assert "counting the samples of 6 shards" in capsys.readouterr().err
    write_shard(shards / "00002.tar", 2, samples=5)
    assert len(task_of(shards)) == (SHARDS - 1) * SAMPLES + 5
    for kept in (shards.parent / "cache").rglob("*.safetensors"):
        kept.write_bytes(b"damaged")
    monkeypatch.setattr("com_pt.training.data.shard_cache.scan_shard", refuse_after(SHARDS))
    assert len(task_of(shards)) == (SHARDS - 1) * SAMPLES + 5


def test_unreadable_samples_of_a_stream_are_replaced_counted_and_bounded(
    shards, monkeypatch, capsys
) -> None:
    content = (shards / "00003.tar").read_bytes()
    at = content.index(b"IDAT")
    (shards / "00003.tar").write_bytes(content[:at] + b"XXXX" + content[at + 4 :])
    task = task_of(shards)
    with pytest.raises(
        InputError, match=r"1 of 96 samples cannot be read, .*00003\.tar, sample 003"
    ):
        batches_of(task, 0, 12)
    monkeypatch.setattr("com_pt.training.data.loading.TOLERATED_UNREADABLE", 0.05)
    numbers = numbers_of(batches_of(task, 0, 12))
    assert (3, 0) not in numbers
    assert numbers.count((3, 1)) == 2
    assert "is skipped: " in capsys.readouterr().err


def test_a_stream_trains_to_the_same_weights_after_an_interruption(shards, tmp_path) -> None:
    from safetensors.torch import load_file

    document = clip_chain(shards, 32, epochs=1, individual_epochs=1, save_every=5, workers=1)
    document["data"] = {**task_of(shards).data}
    document["stages"][0]["model"]["text_cfg"]["vocab_size"] = 12
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    members = run_chain(parse_chain(document), whole)
    assert members[0].steps == SHARDS * SAMPLES // BATCH
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "run", stop_after(7))
        with pytest.raises(KeyboardInterrupt):
            run_chain(parse_chain(document), parts)
    run_chain(parse_chain(document), parts, resume=True)
    weights, resumed = (
        load_file(out / "W32" / "open_clip_model.safetensors") for out in (whole, parts)
    )
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def stop_after(updates: int) -> Any:
    run = Batches.run

    def interrupted(self: Batches, start: int, stop: int) -> Iterator[Any]:
        for step, batch in enumerate(run(self, start, stop)):
            if step == updates:
                raise KeyboardInterrupt
            yield batch

    return interrupted


def test_the_buffer_draws_among_those_that_wait() -> None:
    import random

    order = list(shuffle_through_buffer(range(1000), 50, random.Random(1)))
    assert sorted(order) == [*range(1000)]
    assert all(item <= place + 50 for place, item in enumerate(order))
    assert sum(item < place for place, item in enumerate(order)) > 300
    assert list(shuffle_through_buffer(range(9), 1, random.Random(1))) == [*range(9)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("0000{4..5}.t{ar,ar}", ["00004.tar", "00004.tar", "00005.tar", "00005.tar"]),
        ("*[12].tar", ["00001.tar", "00002.tar"]),
        ("0000{1,2}*", ["00001.tar", "00002.tar"]),
    ],
)
def test_patterns_stand_for_several_files(shards, pattern, names) -> None:
    expected = [shards / name for name in names]
    assert expand_paths(f"{shards}/{pattern}", "data: train") == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{00000..00009}.tar", r"00006\.tar is not there; check data: train"),
        ("{1..0}.tar", r"\{1\.\.0\} in .*\.tar stands for 0 files; correct it"),
        ("{a,{1..0}}.tar", r"\{1\.\.0\} in .* stands for 0 files; correct it"),
        ("{0..9000000}.tar", r"\{0\.\.9000000\} in .* stands for 9000001 files; correct it"),
        ("*.tgz", r"no file matches .*\*\.tgz; check data: train"),
        ("*", r"notes\.txt is no tar, and only tars are streamed; set stream: false"),
    ],
)
def test_patterns_that_name_something_else_are_refused(shards, source, message) -> None:
    (shards / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=message):
        len(task_of(shards, train=f"{shards}/{source}"))


@pytest.mark.parametrize("source", ["pipe:curl x", "https://x.org/{0..3}.tar", "s3://x/0.tar"])
def test_remote_shards_are_refused_by_name(shards, source) -> None:
    with pytest.raises(InputError, match="is no local file; copy the files to a local disk first"):
        len(task_of(shards, train=source, stream=True))


def test_a_pattern_may_be_indexed_and_a_tar_streamed(shards) -> None:
    assert task_of(shards, stream=False).stream is None
    assert len(task_of(shards, stream=False)) == SHARDS * SAMPLES
    assert task_of(shards, train=str(shards / "00000.tar")).stream is None
    task = task_of(shards, train=str(shards / "00000.tar"), stream=True)
    assert len(task) == SAMPLES
    assert sorted(numbers_of(batches_of(task, 0, 2))) == [(0, i) for i in range(SAMPLES)]


@pytest.mark.parametrize("name", ["samples", "shuffle_buffer", "captions"])
@pytest.mark.parametrize("value", [0, "many", 2.5, True])
def test_counts_are_whole_numbers(shards, name, value) -> None:
    with pytest.raises(InputError, match=f"data: {name} is {value!r}; give a whole number of 1"):
        len(task_of(shards, **{name: value}))


def test_a_first_shard_without_samples_is_passed_over(shards) -> None:
    write_shard(shards / "00000.tar", 0, 0)
    assert len(task_of(shards)) == (SHARDS - 1) * SAMPLES
    for shard in range(SHARDS):
        write_shard(shards / f"{shard:05}.tar", shard, 0)
    with pytest.raises(InputError, match=r"00000\.tar holds no samples; give shards with some"):
        len(task_of(shards))


def test_sizes_that_hide_samples_are_warned_about(shards, capsys) -> None:
    (shards / "sizes.json").write_text(json.dumps({f"{i:05}.tar": 10 for i in range(SHARDS)}))
    assert len(task_of(shards)) == SHARDS * 10
    assert "00000.tar has 16 samples, of which 10 are read, as sizes" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["-5", "29.5"])
def test_a_length_beside_the_shards_is_a_count(shards, content) -> None:
    (shards / "__len__").write_text(content)
    with pytest.raises(InputError, match="is no number of samples; write the number of samples"):
        len(task_of(shards))
