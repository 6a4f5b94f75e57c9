"""``sample``: images within a budget."""

import json

from morse_commands import run
from PIL import Image


def test_samples_are_written_with_the_summary_of_the_run(pixels, trained, tmp_path, capsys) -> None:
    out = tmp_path / "images"
    words = ["sample", pixels, trained, "--budget-lsd", 4, "--speed-ratio", 4, "--n", 3]
    told = json.loads(run(capsys, *words, "--out", out, "--json"))
    assert told["files"] == ["0000.png", "0001.png", "0002.png"]
    for name in told["files"]:
        with Image.open(out / name) as picture:
            assert picture.size == (16, 16)
    assert told["summary"]["dot_steps"] > 0
    first = [(out / name).read_bytes() for name in told["files"]]
    again = tmp_path / "again"
    run(capsys, *words, "--out", again)
    assert [(again / name).read_bytes() for name in told["files"]] == first
