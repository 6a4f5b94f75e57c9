"""The README's first command, with small scripts in place of the demos."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from effml_common.errors import InputError
from effml_common.report import Claim, Report, Row
from effml_common.report import write_report as write_package_report
from workspace import COMMON, ROOT, members

PIXEL = bytes.fromhex("89504e470d0a1a0a")  # the signature is enough to be embedded


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_run", ROOT / "benchmarks/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fake_demo(folder: Path, name: str, body: str) -> list[str]:
    """A command that takes a demo's flags; ``out`` is its folder, ``seeds`` their number."""
    script = folder / f"{name}.py"
    flags = "import shutil, sys\nfrom pathlib import Path\n"
    flags += "seeds = int(sys.argv[sys.argv.index('--seeds') + 1])\n"
    flags += "out = Path(sys.argv[sys.argv.index('--out') + 1])\n"
    script.write_text(flags + body)
    return [sys.executable, str(script), "demo"]


@pytest.fixture
def demos(tmp_path: Path) -> dict[str, list[str]]:
    """Three demos: one works, one crashes, one forgets its report."""
    made = tmp_path / "made"
    made.mkdir()
    claim = Claim("c", "ours beats theirs", [1.0, 1.1, 0.9])
    rows = [Row("ours", "varies data", {"loss": [1.0, 2.0, 3.0]})]
    write_package_report(Report("good", "1.0", ["good"], [0, 1, 2], 1.0, rows, [claim]), made)
    (made / "curve.png").write_bytes(PIXEL)
    copy = f"shutil.copytree({str(made)!r}, out / 'run')\nprint('seeds', seeds)\n"
    crash = "print('half way', file=sys.stderr)\nraise RuntimeError('the teacher left')\n"
    return {
        "crashing": fake_demo(tmp_path, "crashing", crash),
        "good": fake_demo(tmp_path, "good", copy),
        "mute": fake_demo(tmp_path, "mute", "out.mkdir()\n"),
    }


def statuses(out: Path) -> dict[str, str]:
    summary = json.loads((out / "report.json").read_text())
    return {demo["name"]: demo["status"] for demo in summary["demos"]}


def test_a_working_demo_gives_one_page_with_its_figures_claims_and_pictures(
    run: ModuleType, demos: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run.main(["--only", "good", "--seeds", "3", "--out", str(out)], demos)
    assert code == 0
    page = (out / "index.html").read_text()
    assert "ours beats theirs" in page
    assert "2 ± 0.58" in page
    assert "data:image/png;base64,iVBORw0KGgo=" in page
    assert "http" not in page
    error = capfd.readouterr().err
    assert "[1/1] good: 0 s so far, about" in error
    assert "seeds 3" in error  # what the demo prints is passed on
    assert error.endswith(f"report: {out / 'index.html'}\n")


def test_a_failing_demo_is_reported_and_the_others_still_run(
    run: ModuleType, demos: dict, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run.main(["--out", str(out)], demos) == 1
    assert statuses(out) == {"crashing": "failed", "good": "done", "mute": "failed"}
    page = (out / "index.html").read_text()
    assert "exit code 1" in page
    assert "the teacher left" in page
    assert "no readable report" in page
    assert "ours beats theirs" in page


def test_the_report_names_no_folder_of_this_machine(
    run: ModuleType, demos: dict, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run.main(["--out", str(out)], demos)
    assert str(tmp_path) not in (out / "index.html").read_text()
    assert str(tmp_path) not in (out / "report.json").read_text()


def test_a_command_that_is_not_there_counts_as_failed(run: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run.main(["--out", str(out)], {"gone": [str(tmp_path / "gone"), "demo"]}) == 1
    assert statuses(out) == {"gone": "failed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "god"], "error: there is no demo god; use one of crashing, good, mute\n"),
        (["--seeds", "0"], "error: seeds is 0; give 1 or more, and 3 or more for claims\n"),
        (
            ["--seeds", "many"],
            "error: Parser key \"seeds\": Expected a <class 'int'>. Got value: many; "
            "see python benchmarks/run.py --help\n",
        ),
        (["--sees", "1"], "error: there is no flag --sees; did you mean --seeds?\n"),
        (["--out", "."], "error: . is already there; name a new folder with --out\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: ModuleType, demos: dict, capsys: pytest.CaptureFixture[str], words: list, message: str
) -> None:
    assert run.main(words, demos) == 2
    assert capsys.readouterr() == ("", message)


def test_json_puts_the_summary_alone_on_stdout(
    run: ModuleType, demos: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run.main(["--only", "good", "--json", "--out", str(tmp_path / "out")], demos)
    assert json.loads(capfd.readouterr().out)["demos"][0]["report"]["rows"][0]["name"] == "ours"


def test_every_package_with_a_demo_takes_part(run: ModuleType) -> None:
    with_demo = {
        m.name for m in members() if m.name != COMMON and (m.source / "demo" / "report.py").exists()
    }
    found = run.find_demos()
    assert set(found) == with_demo
    assert all(os.access(command[0], os.X_OK) for command in found.values())


def test_ctrl_c_stops_the_demo_too(tmp_path: Path, demos: dict) -> None:
    pid_file = tmp_path / "pid"
    sleeper = "import os, time\n"
    sleeper += f"Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    command = fake_demo(tmp_path, "sleeper", sleeper)
    code = (  # a shell that starts the tests in the background has them ignore the signal
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import run\n"
        f"sys.exit(run.main(['--out', {str(tmp_path / 'out')!r}], {{'sleeper': {command!r}}}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    child = int(pid_file.read_text())
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def wait_until(done, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "rows": 3, "claims": []}'],
)
def test_what_is_no_report_is_a_failure_with_a_remedy(run, tmp_path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(
        InputError, match=r"^[^\n]+ is no readable report: [^\n]+; run its command again$"
    ):
        run.read_report(tmp_path / "report.json")
