"""The demo as a user runs it."""

import pytest

from com_pt.config import DemoConfig
from com_pt.demo.data import DigitPairs
from com_pt.demo.report import ARMS_SHOWN, demo


@pytest.mark.slow
def test_the_demo_compares_arms_and_draws_them(tmp_path, monkeypatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = DigitPairs({"held_out": 60})
    monkeypatch.setattr("com_pt.demo.report.DigitPairs", lambda data: small)
    monkeypatch.setattr("com_pt.demo.report.BATCH", 8)
    report = demo(DemoConfig(steps=20, out=str(tmp_path / "out")))
    names = [row.name for row in report.rows]
    alone = [f"{member} alone" for member in "TSB"]
    grown = [f"{member} {arm}" for member in "SB" for arm in ARMS_SHOWN]
    assert sorted(names) == sorted([*alone, *grown, "chain of T, S, B"])
    chain = next(row for row in report.rows if row.name == "chain of T, S, B")
    assert chain.metrics["family ratio"][0] > 1
    assert (tmp_path / "out" / "run" / "report.html").exists()
    import open_clip

    member = tmp_path / "out/run/cells/B_embed-1/run/B"
    assert type(open_clip.create_model(f"local-dir:{member}")).__name__ == "CLIP"
