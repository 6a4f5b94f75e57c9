"""Held-out data through a model: memory, order, errors, and several processes."""

import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import com_pt_judge
import pytest
import torch
from com_pt_tiny import clip, clip_data

import com_pt.training.streaming as streaming
from com_pt.training.data.captions import CaptionData
from com_pt.training.embedding import encode_pictures, encode_texts, evaluate_retrieval
from com_pt.training.streaming import HeldOutPictures, Reading, stream_rows
from effml_common.errors import InputError

CPU = torch.device("cpu")


class Counted:
    """HeldOutPictures that count how many of them are alive."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> torch.Tensor:
        picture = torch.full((3, 8, 16), float(index))
        self.track(picture)
        return picture

    def track(self, tensor: torch.Tensor) -> None:
        self.alive += len(tensor) if tensor.dim() == 4 else 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.drop, len(tensor) if tensor.dim() == 4 else 1)

    def drop(self, count: int) -> None:
        self.alive -= count


def test_no_more_than_two_batches_of_pictures_are_alive_at_once() -> None:
    data = Counted(60)

    def compute(batch: torch.Tensor) -> torch.Tensor:
        data.track(batch)
        return batch[:, 0, 0, :2].clone()

    state = torch.get_rng_state()
    rows = stream_rows(compute, HeldOutPictures(data), Reading(CPU, batch=4), "reading")
    assert torch.equal(torch.get_rng_state(), state)  # a training run goes on as without it
    assert rows[:, 0].tolist() == [*range(60)]
    # The pictures of one batch, the batch itself, and the one before it while it is replaced.
    assert 4 <= data.most <= 12


def test_an_evaluation_holds_embeddings_and_no_pictures() -> None:
    data, model = Counted(64), clip(32)
    encode = model.encode_image
    model.encode_image = lambda batch: (data.track(batch), encode(batch))[1]
    data.texts = [["a"]] * 64  # pyright: ignore
    data.tokenize = lambda texts: torch.ones(len(texts), 8).long()  # pyright: ignore
    evaluate_retrieval(model, data, Reading(CPU, batch=4))
    assert 8 <= data.most <= 12
    assert data.alive == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_embeddings_are_those_of_the_whole_set_at_once_in_its_order(pictures, workers) -> None:
    data = CaptionData.open({**clip_data(pictures), "val": str(pictures / "captions.tsv")},
                            "val", captions=None)  # fmt: skip
    model, reading = clip(32), Reading(CPU, batch=7, workers=workers)
    images = torch.stack([data.image(i) for i in range(48)])
    expected = model.encode_image(images, normalize=True).detach()
    ours = encode_pictures(model, data, reading)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    captions = [text for line in data.texts for text in line]
    expected = model.encode_text(data.tokenize(captions), normalize=True).detach()
    ours = encode_texts(model, captions, data.tokenize, reading)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_held_out_picture_that_cannot_be_read_is_named(pictures, workers) -> None:
    data = CaptionData.open({**clip_data(pictures), "val": str(pictures / "captions.tsv")},
                            "val", captions=None)  # fmt: skip
    (pictures / "17.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"17\.png.*; replace the picture"):
        encode_pictures(clip(32), data, Reading(CPU, batch=8, workers=workers))


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(InputError, match="there are no held-out samples; give some"):
        stream_rows(lambda batch: batch, [], Reading(CPU), "reading")


def test_readers_are_started_for_large_sets_of_pictures_and_shared_by_processes(
    monkeypatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(9), raising=False)
    small, large = HeldOutPictures(Counted(100)), HeldOutPictures(Counted(100_000))
    assert Reading(CPU).workers_for(small) == 0
    assert Reading(CPU).workers_for(large) == 8
    assert Reading(CPU).workers_for(["a text"] * 100_000) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert Reading(CPU).workers_for(large) == 2
    assert Reading(CPU, workers=5).workers_for(small) == 5


def test_a_long_set_is_announced_with_the_time_that_it_takes(monkeypatch, capsys) -> None:
    clock = iter(range(0, 10**6, 10))  # ten seconds from one look to the next
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    rows = stream_rows(lambda batch: batch, torch.arange(40), Reading(CPU, batch=2), "reading")
    assert torch.equal(rows, torch.arange(40))
    error = capsys.readouterr().err
    assert "reading: about 3.2 minutes for 20 batches\n" in error
    assert "reading: 20/20 (100 %)" in error
    stream_rows(lambda batch: batch, torch.arange(10), Reading(CPU, batch=2), "reading")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_two_processes_measure_exactly_what_one_does(pictures, tmp_path) -> None:
    names = ["red", "green", "blue"]
    rows = [f"{i}.png,{names[i % 3]}" for i in range(48)]
    (pictures / "names.csv").write_text("\n".join(["path,class", *rows]) + "\n")
    rows = [f"{i}.png,{i % 3}" for i in range(48)]
    (pictures / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (pictures / "text.txt").write_text("the order of the words is kept " * 20)
    command = [sys.executable, com_pt_judge.__file__, str(pictures), f"file://{tmp_path}/meeting"]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    expected = com_pt_judge.measure(pictures)
    said = [process.communicate(timeout=280)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    processes, metrics = json.loads(said[0].splitlines()[-1])
    assert processes == 2
    assert len(expected) > 15
    assert metrics == expected
