"""``demo``: the report of the small networks."""

import json
import os
import subprocess
import sys

import pytest

from morse_diffusion.demo.arms import SHOWN_METHODS


@pytest.mark.slow
def test_the_demo_writes_its_report(tmp_path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [
            sys.executable, "-m", "morse_diffusion", "demo", "--samples", "64", "--budgets", "5", "10",
            "--out", str(out), "--json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    floor, *rows = json.loads(done.stdout)["rows"]
    assert (floor["name"], floor["setting"]) == ("64 real images", "the floor")
    arms = {(method, f"{budget} LSD") for method in SHOWN_METHODS for budget in (5, 10)}
    assert {(row["name"], row["setting"].partition(":")[0]) for row in rows} == arms
    assert len(rows) == len(arms)
    assert {"report.html", "quality.png", "samples.png"} <= {
        p.name for p in (out / "run").iterdir()
    }
