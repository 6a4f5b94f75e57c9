"""One run at a time in an out folder."""

import subprocess
import sys
import time

import pytest

from effml_common.errors import InputError
from effml_common.locking import LOCK, locked_folder

HOLD = (
    "import sys, time; from pathlib import Path; from effml_common.locking import locked_folder\n"
    "with locked_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_is_killed(holder, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is in use by another run; wait"), locked_folder(out):
        pass
    assert (out / LOCK).exists()
    holder.kill()
    holder.wait()
    with locked_folder(out):
        assert (out / LOCK).exists()


def test_nothing_stays_but_what_the_run_wrote(tmp_path) -> None:
    with locked_folder(tmp_path / "runs" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "out"):
        (tmp_path / "out" / "run" / "report.json").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "run", "report.json"]


def test_only_the_first_process_of_several_locks(tmp_path, monkeypatch) -> None:
    with locked_folder(tmp_path):
        with pytest.raises(InputError, match="is in use"), locked_folder(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        entered = False
        with locked_folder(tmp_path):
            entered = True
        assert entered
        assert (tmp_path / LOCK).exists()  # the first process's, which the second one left alone
        monkeypatch.delenv("RANK")


def test_a_folder_is_free_again_at_once(tmp_path) -> None:
    start = time.monotonic()
    for _ in range(20):
        with locked_folder(tmp_path / "out"):
            pass
    assert time.monotonic() - start < 5
