"""Metrics files that resume exactly, and progress that fits where it is read."""

import contextlib
import json
import math
import os
import pty
import sys
from pathlib import Path

import pytest
import torch

from effml_common import logging
from effml_common.errors import ConfigError
from effml_common.logging import Progress, RunLog, jsonable, load_sink, rank, say, set_quiet, warn


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    yield
    set_quiet(False)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path, steps: range, resume_step: int | None = None) -> bytes:
    with RunLog(folder, resume_step=resume_step) as log:
        for step in steps:
            log.log(step, {"loss": 1 / (step + 1), "lr": torch.tensor(0.5) ** step})
    return (folder / "metrics.jsonl").read_bytes()


def test_every_call_appends_one_object_with_its_step(tmp_path: Path) -> None:
    logged(tmp_path / "run", range(3))
    assert lines(tmp_path / "run") == [
        {"step": 0, "loss": 1.0, "lr": 1.0},
        {"step": 1, "loss": 0.5, "lr": 0.5},
        {"step": 2, "loss": 1 / 3, "lr": 0.25},
    ]


def test_a_line_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(0, {"loss": 1.0})
        assert len(lines(tmp_path)) == 1


def test_numbers_that_json_lacks_are_strings(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(0, {"a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf), "d": [math.nan]})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "metrics.jsonl").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read == {"step": 0, "a": "nan", "b": "-inf", "c": "inf", "d": ["nan"]}


@pytest.mark.parametrize("resume_step", [0, 3, 7])
@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "lo', b'{"step": 1}', b"\xff\x00"])
def test_a_resumed_file_equals_the_uninterrupted_one(
    tmp_path: Path, resume_step: int, torn: bytes
) -> None:
    whole = logged(tmp_path / "whole", range(10))
    logged(tmp_path / "cut", range(8))
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert logged(tmp_path / "cut", range(resume_step + 1, 10), resume_step) == whole


def test_without_resuming_a_new_file_begins(tmp_path: Path) -> None:
    first = logged(tmp_path, range(4))
    assert logged(tmp_path, range(4)) == first
    assert logged(tmp_path, range(4), resume_step=-1) == first


def test_resuming_without_an_earlier_file_begins_one(tmp_path: Path) -> None:
    assert logged(tmp_path / "a", range(4), resume_step=9) == logged(tmp_path / "b", range(4))


def test_the_sink_sees_every_step(tmp_path: Path) -> None:
    seen = []
    with RunLog(None, sink=lambda step, metrics: seen.append((step, dict(metrics)))) as log:
        log.log(3, {"loss": 1.0})
        log.log(4, {"loss": 2.0})
    assert seen == [(3, {"loss": 1.0}), (4, {"loss": 2.0})]
    assert os.listdir(tmp_path) == []


def test_other_ranks_write_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    seen = []
    with RunLog(tmp_path, sink=lambda *args: seen.append(args)) as log:
        with log.progress("work", 1) as bar:
            bar.advance()
        log.log(0, {"loss": 1.0})
    say("hello")
    warn("careful")
    assert rank() == 1
    assert (os.listdir(tmp_path), seen, capsys.readouterr()) == ([], [], ("", ""))


def test_quiet_silences_words_and_progress_but_no_warning(capsys) -> None:
    set_quiet(True)
    say("hello")
    warn("careful")
    with Progress("work", 1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "warning: careful\n")


def test_words_go_to_stderr(capsys) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(logging.time, "monotonic", lambda: self.now)


def test_without_a_terminal_lines_are_ten_seconds_apart_and_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    clock = Clock(monkeypatch)
    with Progress("training", 100) as bar:
        for _ in range(100):
            clock.now += 0.5
            bar.advance(loss=0.123456)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[0] == "training: 20/100 (20 %), loss 0.1235, 10 s elapsed, 40 s left"
    assert said[-1] == "training: 100/100 (100 %), loss 0.1235, 50 s elapsed, 0 s left"


def test_lines_fall_on_multiples_of_the_interval(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with RunLog(None, every=8) as log, log.progress("training", 20) as bar:
        for step in range(20):
            clock.now += 11
            log.log(step, {"n": step})
            bar.advance()
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["8/20", "16/20", "20/20"]
    assert "n 7," in said[0]


def test_a_loop_that_ends_early_says_how_far_it_came(capsys) -> None:
    with contextlib.suppress(RuntimeError), Progress("work", 10) as bar:
        bar.advance(3)
        raise RuntimeError
    with Progress("nothing", 0):
        pass
    assert capsys.readouterr().err.startswith("work: 3/10 (30 %)")


def read_to_the_end(leader: int) -> str:
    """All that was written to a terminal whose other side is closed: one read gives only a part."""
    parts = []
    with contextlib.suppress(OSError):  # Linux says EIO at the end, others an empty read
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    os.close(leader)
    return b"".join(parts).decode()


def test_on_a_terminal_a_bar_with_the_fields_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("training", 2) as bar:
            with Progress("inner", 1) as inner:
                inner.advance()
            bar.advance(loss=0.5)
            bar.advance(loss=0.25)
    drawn = read_to_the_end(leader)
    assert "training" in drawn
    assert "100%" in drawn
    assert "loss 0.25" in drawn
    assert "inner" not in drawn


def test_nested_values_become_plain_json() -> None:
    value = {"a": (1, Path("x/y")), 2: {"b": torch.tensor(3)}, "c": None, "d": True}
    assert jsonable(value) == {"a": [1, "x/y"], "2": {"b": 3}, "c": None, "d": True}


def test_a_sink_is_found_by_its_address_and_a_wrong_one_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_tracker.py").write_text(
        "lines = []\ndef note(step, metrics): lines.append(step)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sink = load_sink("my_tracker:note")
    assert sink is not None
    with RunLog(None, sink=sink) as log:
        log.log(3, {"loss": 1.0})
    assert sys.modules["my_tracker"].lines == [3]
    assert load_sink(None) is None
    for address, why in (("nowhere:f", "cannot be imported: No module"), ("my_tracker", "give module:f"),
                         ("my_tracker:lines", "is no function")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            load_sink(address)
