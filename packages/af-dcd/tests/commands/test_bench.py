"""What bench measures."""

import json

import pytest

from af_dcd import PRESETS
from af_dcd.cli import COMMANDS
from af_dcd.commands._peak_memory import ContrastCase, measure_peak_bytes
from effml_common.cli import main


@pytest.mark.slow
def test_bench_measures_both_forms_and_says_where_the_time_goes(tmp_path, capsys) -> None:
    words = ["bench", "--channels", "32", "--student-channels", "8", "--height", "16"]
    words += ["--width", "32", "--repeats", "1", "--out", str(tmp_path), "--json", "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert set(rows) == {"contrast, chunked", "contrast, naive", "generator and mimicking"}
    assert rows["contrast, naive"]["peak extra MB"]["mean"] > 0
    assert any("generator" in note for note in report["notes"])


@pytest.mark.slow
def test_at_cityscapes_shape_the_chunked_contrast_takes_under_a_fifth_of_the_memory() -> None:
    shape, settings = (1, 2048, 64, 128), PRESETS["cityscapes"].contrast_settings()
    chunked, naive = (
        measure_peak_bytes(ContrastCase(shape, {**settings, "impl": form}, "cpu"))
        for form in ("chunked", "naive")
    )
    assert chunked < naive / 5
