"""The order of samples, and those that cannot be read."""

import multiprocessing
import os
import signal

import pytest
import torch
from com_pt_tiny import task_of

from com_pt.training.data.loading import Batches, reader_count
from effml_common.errors import InputError


def test_an_unreadable_image_is_skipped_counted_and_named_and_many_abort(
    pictures, capsys, monkeypatch
) -> None:
    task = task_of(pictures)
    (pictures / "5.png").write_bytes(b"\x89PNG broken")
    batches = Batches(task, 8, seed=0)
    with pytest.raises(InputError, match=r"1 of 48 samples cannot be read, more than 1 % .*5\.png"):
        list(batches.run(0, 6))
    monkeypatch.setattr("com_pt.training.data.loading.TOLERATED_UNREADABLE", 0.05)
    batches = Batches(task, 8, seed=0)
    made = list(batches.run(0, 6))
    assert len(made) == 6
    assert all(images.shape[0] == 8 for images, _ in made)
    assert list(batches.readable.bad) == [5]
    assert "sample 5 is skipped: " in capsys.readouterr().err


def test_batches_do_not_depend_on_processes_or_on_where_they_start(pictures) -> None:
    task = task_of(pictures)
    whole = list(Batches(task, 8, seed=3).run(0, 10))
    later = list(Batches(task, 8, seed=3).run(7, 10))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[7:], later, strict=True))
    halves = [list(Batches(task, 8, seed=3, rank=r, world=2).run(0, 2)) for r in range(2)]
    for step in range(2):
        joined = torch.cat([halves[0][step][0], halves[1][step][0]])
        order = [*range(0, 8, 2), *range(1, 8, 2)]
        assert torch.equal(joined, whole[step][0][order])


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (64, 1, "48 training samples are fewer than one batch of 64"),
        (9, 2, "a batch of 9 cannot be split over 2 processes"),
        (1, 2, "a batch of 1 cannot be split over 2 processes"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(pictures, batch, world, message) -> None:
    with pytest.raises(InputError, match=message):
        Batches(task_of(pictures), batch, seed=0, world=world)


def test_readers_outlive_signals_that_a_scheduler_sends_to_all_processes(pictures) -> None:
    task = task_of(pictures)
    expected = list(Batches(task, 8, seed=3).run(0, 12))
    before = {*multiprocessing.active_children()}
    batches = Batches(task, 8, seed=3, workers=1).run(0, 12)
    read = [next(batches)]
    for reader in {*multiprocessing.active_children()} - before:
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(reader.pid, signum)
    read += batches
    assert all(torch.equal(a[0], b[0]) for a, b in zip(read, expected, strict=True))


@pytest.mark.parametrize(
    ("cpus", "processes", "readers"), [(1, 1, 0), (2, 1, 1), (16, 2, 7), (192, 8, 8), (8, 8, 0)]
)
def test_readers_are_chosen_by_the_cpus_of_a_process(
    pictures, monkeypatch, cpus, processes, readers
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cpus)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    task = task_of(pictures)
    assert reader_count(task) == Batches(task, 8, seed=0, workers=None).workers == readers
    assert reader_count(range(9)) == 0
    assert Batches(task, 8, seed=0, workers=3).workers == 3


def test_an_error_in_a_reader_process_is_one_line_too(pictures) -> None:
    for i in range(48):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    errors = []
    for workers in (0, 2):
        batches = Batches(task_of(pictures), 8, seed=0, workers=workers)
        with pytest.raises(InputError, match="samples in a row cannot be read") as caught:
            list(batches.run(0, 6))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "png: no picture of a known kind, or a damaged one; replace the picture" in errors[0]
