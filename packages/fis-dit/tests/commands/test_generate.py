"""The generate command on a tiny pipeline."""

import json
from typing import Any

import pytest
from fis_dit_pipelines import SIZE, call
from PIL import Image

from fis_dit.adapters import pipelines
from fis_dit.adapters.pipelines import ClipRequest, run_pipeline
from fis_dit.config import FISConfig


def test_generate_writes_both_clips_their_distance_and_the_plan(wan_directory, tmp_path) -> None:
    out = tmp_path / "out"
    words = (str(wan_directory), *SIZE, "--compare-dense", "--dtype", "float32", "--out", str(out))
    assert call("generate", *words, "--format", "gif") == 0
    report = json.loads((out / "run" / "report.json").read_text())
    row = next(row for row in report["rows"] if row["name"] == "FIS")
    assert row["metrics"]["relative L2"]["mean"] > 0
    for name in ("FIS", "dense"):
        metrics = next(row for row in report["rows"] if row["name"] == name)["metrics"]
        assert 0 < metrics["transformer seconds"]["mean"] < metrics["seconds"]["mean"]
    for name in ("fis.gif", "dense.gif"):
        with Image.open(out / name) as clip:
            assert clip.size == (16, 16)
    assert FISConfig.from_json((out / "run" / "plan.json").read_text()).stride == 2


def test_a_comparison_makes_one_step_of_each_kind_before_it_times_any(
    wan_directory, tmp_path, monkeypatch
) -> None:
    steps: list[tuple[int, str]] = []

    def watch(pipe: Any, request: ClipRequest, output_type: str = "np") -> Any:
        steps.append((request.steps, output_type))
        return run_pipeline(pipe, request, output_type)

    monkeypatch.setattr(pipelines, "run_pipeline", watch)
    words = (str(wan_directory), *SIZE, "--dtype", "float32", "--out", str(tmp_path / "out"))
    assert call("generate", *words, "--compare-dense") == 0
    assert steps == [(1, "latent"), (4, "np")] * 2
    steps.clear()
    assert call("generate", *words) == 0
    assert steps == [(4, "np")]


def test_generate_writes_mp4_where_imageio_is_there(wan_directory, tmp_path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    words = (str(wan_directory), *SIZE, "--dtype", "float32", "--out", str(tmp_path / "out"))
    assert call("generate", *words, "--format", "mp4") == 0
    assert (tmp_path / "out" / "fis.mp4").stat().st_size > 100
