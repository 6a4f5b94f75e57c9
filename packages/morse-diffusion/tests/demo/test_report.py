"""``demo``: the report of the small networks."""

import json
import os
import subprocess
import sys

import pytest


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
    assert len(json.loads(done.stdout)["rows"]) == 11
    assert {"report.html", "quality.png", "samples.png"} <= {
        p.name for p in (out / "run").iterdir()
    }
