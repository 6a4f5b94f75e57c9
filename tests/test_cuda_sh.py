"""benchmarks/cuda.sh keeps what was measured, whatever a later part does."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import carry_wheels
import run_on_cuda
from run_on_cuda import Part
from workspace import ROOT, members


def part(name: str, code: str, limit: float = 30) -> Part:
    return Part(name, [sys.executable, "-c", code], limit)


def run(
    parts: Sequence[Part], folder: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 8
) -> dict:
    """Run stand-ins for the parts; the summary that they leave."""
    monkeypatch.setattr(run_on_cuda, "plan", lambda *_: iter(parts))
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir()
    scratch.mkdir()
    flags = argparse.Namespace(out=out, wheels=folder, device="cpu", tiny=True, minutes=minutes)
    run_on_cuda.run_all(flags, scratch)
    return json.loads((out / "summary.json").read_text())


def states(summary: dict) -> dict[str, str]:
    return {each["part"]: each["state"] for each in summary["parts"]}


def test_a_part_that_fails_stops_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last part looks at what the summary said before it ran.
    look = "import json; s = json.load(open('OUT')); assert len(s['parts']) == 2".replace(
        "OUT", str(tmp_path / "out" / "summary.json")
    )
    parts = [part("first", "raise SystemExit(3)"), part("second", "print(7)"), part("third", look)]
    summary = run(parts, tmp_path, monkeypatch)
    assert states(summary) == {"first": "failed", "second": "ok", "third": "ok"}
    assert summary["parts"][0]["exit"] == 3
    assert "first: failed" in capsys.readouterr().out
    assert "7" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_that_overruns_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_on_cuda, "GRACE", 0.5)
    ids = tmp_path / "child"
    code = (
        "import subprocess, signal, time, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']);"
        f"pathlib.Path({str(ids)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    summary = run([part("endless", code, 6), part("next", "")], tmp_path, monkeypatch)
    assert states(summary) == {"endless": "timed out", "next": "ok"}
    assert time.monotonic() - start < 40
    status = Path(f"/proc/{ids.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_part_that_is_interrupted_may_still_say_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("said", 9)
"""
    summary = run([part("long", code, 6)], tmp_path, monkeypatch)
    assert states(summary) == {"long": "timed out"}
    assert "said 9" in (tmp_path / "out" / "log.txt").read_text()


def test_what_comes_after_the_whole_time_is_named_and_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run([part("late", "raise SystemExit(1)")], tmp_path, monkeypatch, minutes=0.1)
    assert states(summary) == {"late": "no time left"}


def test_the_plan_has_every_package_and_at_most_eight_files(tmp_path: Path) -> None:
    parts = list(run_on_cuda.plan(tmp_path, tmp_path, tmp_path, "cuda", False))
    assert [each.name for each in parts][:3] == ["install", "ceilings", "tests"]
    ours = {member.module for member in members() if member.scripts}
    assert set(run_on_cuda.MODULES) == ours
    assert {each.name for each in parts[3:]} == ours
    assert len(ours) + len(("summary.json", "log.txt")) <= 8
    assert "--collect-only" not in parts[2].command


def test_packages_from_the_source_tree_have_a_version_and_their_floors_are_checked(
    tmp_path: Path,
) -> None:
    run_on_cuda.describe_members(tmp_path)
    code = "from importlib.metadata import version; print(version('com-pt'))"
    environ = run_on_cuda.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == next(m.version for m in members() if m.name == "com-pt")
    assert run_on_cuda.unmet(tmp_path) == []
    folder = tmp_path / "needy-1.dist-info"
    folder.mkdir()
    text = "Name: needy\nVersion: 1\nRequires-Dist: torch>=99\nRequires-Dist: opencv-python\n"
    (folder / "METADATA").write_text(text)
    (line,) = run_on_cuda.unmet(tmp_path)
    assert line.startswith("needy requires torch>=99; ")


def test_without_wheels_it_says_where_they_come_from(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/run_on_cuda.py", tmp_path / "out", "--wheels", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run python scripts/carry_wheels.py" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bare_machine_runs_everything_without_network(tmp_path: Path) -> None:
    # What the machine has and we touch, at its versions where they are known.
    have = carry_wheels.there()
    names = """
        accelerate aiohttp colorama einops fsspec huggingface-hub hypothesis imageio jaxtyping httpx
        jinja2 lxml matplotlib opencv-python-headless pandas peft pillow pip portalocker pyarrow
        pytest pytest-timeout pytest-xdist pyyaml regex requests rich safetensors scikit-learn scipy
        sentencepiece setuptools tabulate timm tokenizers torch torchvision transformers triton typer
        wadler-lindig xxhash zipp
    """
    lines = [f"{name}=={have[name]}" if have[name] else name for name in names.split()]
    lines = ["numpy", *(line for line in lines if not line.startswith("numpy"))]
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    python = tmp_path / "bare" / "bin" / "python3"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"

    def done(*command: object, cwd: Path = ROOT) -> None:
        subprocess.run([str(each) for each in command], cwd=cwd, env=clean, check=True)

    done("uv", "venv", "--quiet", "--python", version, python.parents[1])
    # From elsewhere: in the tree uv would hold the machine's versions against our pins.
    done("uv", "pip", "install", "--quiet", "--python", python, *lines, cwd=tmp_path)
    wheels = tmp_path / "wheels"
    done(sys.executable, "scripts/carry_wheels.py", "--python", version, "--out", wheels)

    clean["PATH"] = f"{python.parent}{os.pathsep}{clean['PATH']}"
    no_network = ("unshare", "-n") if os.geteuid() == 0 else ()
    out = tmp_path / "out"
    flags = ("--device", "cpu", "--tiny", "--minutes", "30", "--wheels", wheels)
    done(*no_network, "benchmarks/cuda.sh", out, *flags)
    assert len(list(out.iterdir())) <= 8
    assert json.loads((out / "summary.json").read_text())["unmet"] == []
