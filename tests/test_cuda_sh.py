"""benchmarks/cuda.sh keeps what was measured, whatever a later part does."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks import cuda_ceilings

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
    run_on_cuda.prepare(out)
    scratch.mkdir()
    flags = argparse.Namespace(out=out, wheels=folder, device="cpu", tiny=True, minutes=minutes)
    run_on_cuda.run_all(flags, scratch)
    return json.loads((out / "summary.json").read_text())


def cuda_sh(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run benchmarks/cuda.sh with this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "benchmarks" / "cuda.sh", *arguments]
    return subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


def start(parts: Sequence[Part], folder: Path, *before: str) -> subprocess.Popen[str]:
    """Start the script with stand-ins for the parts and wait until the first one runs."""
    (folder / "thing-1-py3-none-any.whl").touch()
    # The tests themselves may run under nohup, which children inherit.
    hang_up = "" if before else "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"""
import signal, sys
{hang_up}
sys.path.insert(0, {str(ROOT / "scripts")!r})
import run_on_cuda
from run_on_cuda import Part
run_on_cuda.GRACE = 1
run_on_cuda.plan = lambda *_: iter({list(parts)!r})
sys.argv = ["cuda.sh", {str(folder / "out")!r}, "--wheels", {str(folder)!r}]
sys.exit(run_on_cuda.main())
"""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = folder / "out" / "log.txt"
    deadline = time.monotonic() + 60
    while not log.exists() or "started" not in log.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


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


@pytest.mark.slow
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
    began = time.monotonic()
    summary = run([part("endless", code, 6), part("next", "")], tmp_path, monkeypatch)
    assert states(summary) == {"endless": "timed out", "next": "ok"}
    assert time.monotonic() - began < 40
    status = Path(f"/proc/{ids.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_a_part_that_is_interrupted_may_still_say_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shell's background process, and so its children, would ignore the interruption.
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
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


POLITE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("said", 9)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, POLITE),
        (signal.SIGHUP, POLITE),
        (signal.SIGINT, POLITE),
        (signal.SIGINT, STUBBORN),
    ],
)
def test_an_interrupted_run_keeps_its_record_and_says_what_it_did_not_run(
    number: signal.Signals, code: str, tmp_path: Path
) -> None:
    process = start([part("long", code), part("next", ""), part("last", "")], tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert states(summary) == {"long": "interrupted", "next": "not run", "last": "not run"}
    table = output.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["part", "long", "next", "last"]
    assert "Traceback" not in output
    exit_code = summary["parts"][0]["exit"]
    said = "said 9" in (tmp_path / "out" / "log.txt").read_text()
    assert (exit_code, said) == ((0, True) if code == POLITE else (-signal.SIGKILL, False))


def test_a_terminal_that_is_gone_costs_no_record(tmp_path: Path) -> None:
    process = start([part("long", POLITE), part("next", "")], tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert states(summary) == {"long": "interrupted", "next": "not run"}


def test_under_nohup_a_hang_up_ends_nothing(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"""
import pathlib, time
print("started", flush=True)
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.05)
"""
    process = start([part("long", code)], tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    go.touch()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_results_of_an_earlier_run_are_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ours = {"com_pt-cuda.json", "sliderquant-cuda.json", "summary.json", "log.txt"}
    theirs = {"notes.txt", "other-cuda.json", "com_pt-cuda.json.old"}
    for name in ours | theirs:
        (out / name).write_text("from before")
    run([part("com_pt", "raise SystemExit(3)")], tmp_path, monkeypatch)
    assert {path.name for path in out.iterdir()} == {*theirs, "summary.json", "log.txt"}
    assert "from before" not in (out / "log.txt").read_text()


@pytest.mark.parametrize(
    ("body", "mark", "state"),
    [
        ("pass", "", "ok"),
        pytest.param(
            "pass", "@pytest.mark.skip(reason='no card')", "failed", marks=pytest.mark.slow
        ),
        pytest.param("assert False", "", "failed", marks=pytest.mark.slow),
    ],
)
def test_the_tests_fail_if_every_one_of_them_was_skipped(
    body: str, mark: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_card.py"
    skipped = "@pytest.mark.skip(reason='never')\ndef test_other():\n    pass\n"
    file.write_text(f"import pytest\n{skipped}\n{mark}\ndef test_card():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-c", os.devnull, "-p", "no:cacheprovider"]
    tests = Part("tests", [*command, "--rootdir", str(tmp_path), str(file)], 60, must_pass=True)
    summary = run([tests], tmp_path, monkeypatch)
    assert states(summary) == {"tests": state}
    said = "no test passed" in (tmp_path / "out" / "log.txt").read_text()
    assert said == bool(mark)


@pytest.mark.parametrize(("device", "must"), [("cuda", True), ("cuda:1", True), ("cpu", False)])
def test_only_on_a_card_must_a_test_pass(device: str, must: bool, tmp_path: Path) -> None:
    parts = list(run_on_cuda.plan(tmp_path, tmp_path, tmp_path, device, False))
    assert [each.name for each in parts if each.must_pass] == ["tests"] * must


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


def test_what_is_left_of_a_removed_package_counts_as_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone-1.dist-info").mkdir()
    folder = tmp_path / "numbered-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: numbered\n")  # and no version
    monkeypatch.syspath_prepend(tmp_path)
    assert run_on_cuda.unmet(tmp_path) == []
    assert "torch" in cuda_ceilings.versions()


def test_options_may_stand_before_the_folder_and_paths_are_the_callers(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "thing-1-py3-none-any.whl").touch()
    # Too short to start any part with.
    flags = ("--device", "cpu", "--tiny", "--minutes", "0.05", "--wheels", "wheels")
    done = cuda_sh(*flags, "results", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert set(states(summary).values()) == {"no time left"}
    assert summary["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("file",), "cannot write to .*file .*; name another folder"),
        (("out", "--device", "nonsense"), "--device nonsense: use cuda, cuda:N or cpu"),
        (("out", "--minutes", "-1"), "--minutes -1: must be a finite number above 0"),
        (("out", "--minutes", "nan"), "--minutes nan: must be a finite number above 0"),
        (("out", "--minutes", "inf"), "--minutes inf: must be a finite number above 0"),
    ],
)
def test_a_wrong_argument_gets_one_line(
    arguments: Sequence[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "thing-1-py3-none-any.whl").touch()
    done = cuda_sh(*arguments, "--wheels", ".", cwd=tmp_path)
    assert done.returncode == 2
    usage, _, error = done.stderr.partition("cuda.sh: error: ")
    assert usage.startswith("usage: ")
    assert "Traceback" not in done.stderr
    assert re.fullmatch(message + "\n", error)
    assert not (tmp_path / "out").exists()


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
