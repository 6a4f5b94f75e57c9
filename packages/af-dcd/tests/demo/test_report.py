"""The demo from start to end, at toy size."""

import json

import pytest

from af_dcd.cli import COMMANDS
from effml_common.cli import main

SMALL = ["--teacher-steps", "4", "--teacher-scenes", "4", "--teacher-width", "4"]
SMALL += ["--student-width", "4", "--scenes", "3", "--steps", "3", "--tests", "4", "--batch", "2"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_demo_compares_and_reports(toy, monkeypatch, capsys) -> None:
    monkeypatch.setattr("af_dcd.demo.report.LEAST_TEACHER_LEAD", -100.0)
    words = ["demo", *SMALL, "--out", str(toy / "out"), "--json", "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in report["rows"]}
    assert {"teacher", "alone", "KD", "full Af-DCD", "alone, equal time"} <= names
    assert {c["holds"] for c in report["claims"]} == {"not resolved"}  # one seed resolves nothing
    for name in ("report.html", "report.json", "metrics.jsonl"):
        assert (toy / "out/run" / name).is_file()
    if report["files"]:
        assert (toy / "out/run/maps.png").stat().st_size > 10_000
    assert list((toy / "cache/effml/af-dcd").glob("teacher-*.safetensors"))


def test_a_teacher_that_is_no_better_ends_the_demo(toy, capsys) -> None:
    words = ["demo", *SMALL, "--out", str(toy / "out"), "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 2
    assert "points above the student alone" in capsys.readouterr().err
