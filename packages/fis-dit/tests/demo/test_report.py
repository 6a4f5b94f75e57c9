"""The demo's report, plot and animation."""

import json

from PIL import Image

from fis_dit.config import DemoConfig
from fis_dit.demo import report as demo_module
from fis_dit.demo.data import FRAMES
from fis_dit.demo.report import demo


def test_the_demo_writes_table_claims_plot_and_animation(tmp_path, monkeypatch) -> None:
    all_arms = demo_module.make_arms

    def make_arms(ratios):
        kept = ("dense", "FIS paper-like", "FIS static anchors", "FIS interleaved, same count")
        kept += ("3 steps", "skip blocks 2 6 7")
        return [arm for arm in all_arms(ratios) if arm.name in kept]

    monkeypatch.setattr(demo_module, "make_arms", make_arms)
    report = demo(DemoConfig(clips=4, out=str(tmp_path)))
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["rows"][0]["name"] == "dense"
    assert {claim["holds"] for claim in told["claims"]} == {"not resolved"}  # one seed
    assert len(report.rows) == 6
    with Image.open(tmp_path / "run" / "clips.gif") as clip:
        assert clip.n_frames == FRAMES
    assert (tmp_path / "run" / "quality.png").stat().st_size > 1000
    assert "clips" in (tmp_path / "run" / "report.html").read_text()
