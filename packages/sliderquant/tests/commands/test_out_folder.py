"""What a folder of --out belongs to: one run at a time, one model, one text, one set of settings."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from effml_common.cli import main
from effml_common.errors import InputError
from effml_common.locking import locked_folder
from sliderquant.cli import COMMANDS
from sliderquant.commands import quantize as quantize_command
from sliderquant.commands._out_folder import check_resumable

SMALL = ["--group-size", "8", "--nsamples", "4", "--seqlen", "16"]


def run(*words: object, check: int = 0) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("sliderquant", "sliderquant", COMMANDS, list(map(str, words)))
    assert code == check, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def words(save, tmp_path) -> list[object]:
    """A command that quantizes a tiny model to a native folder, given an --out."""
    directory, text = save("llama"), tmp_path / "text.txt"
    return [
        "quantize",
        directory,
        "--calib",
        text,
        "--eval-text",
        text,
        "--format",
        "native",
        *SMALL,
    ]


@pytest.fixture
def finished(words, tmp_path) -> Path:
    run(*words, "--out", tmp_path / "out")
    return tmp_path / "out"


def change_model(tmp_path: Path) -> None:
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(tmp_path: Path) -> None:
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


def change_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(path.read_text()[::-1])


def leave(tmp_path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("more", "change", "message"),
    [
        (["--wbits", 3], leave, "was made with wbits 4, not 3; resume with the same settings"),
        (["--format", "dense"], leave, "was made with format native, not dense"),
        (["--container-bits", 8], leave, "was made with container_bits None, not 8"),
        (["--seed", 3], leave, "was made with seed 2, not 3"),
        ([], change_model, "was made with model (sha256)"),
        ([], change_config, "was made with model (sha256)"),
        ([], change_text, "was made with calibration tokens (sha256)"),
    ],
)
@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "unfinished"])
def test_another_run_is_refused(finished, words, tmp_path, stopped, more, change, message) -> None:
    if stopped:  # as after a kill before anything was published
        for path in [*finished.glob("*.*"), finished / "run" / "report.json"]:
            path.unlink()
    change(tmp_path)
    before = contents(finished)
    done = run(*words, *more, "--out", finished, "--resume", "auto", check=2)
    assert message in done.stderr
    assert contents(finished) == before


def test_a_finished_run_says_so_and_changes_nothing(finished, words) -> None:
    before = contents(finished)
    done = run(*words, "--out", finished, "--resume", "auto", "--json")
    assert "is finished already and unchanged" in done.stderr
    assert contents(finished) == before
    assert json.loads(done.stdout) == json.loads((finished / "run" / "report.json").read_text())


def test_a_run_whose_report_is_missing_writes_it_again(finished, words) -> None:
    before = contents(finished)
    for name in ("run/report.json", "README.md"):
        (finished / name).unlink()
    run(*words, "--out", finished, "--resume", "auto")
    after = contents(finished)
    assert after.keys() == before.keys()
    assert after["sliderquant.safetensors"] == before["sliderquant.safetensors"]


@pytest.mark.parametrize("name", ["sliderquant.safetensors", "tokenizer.json"])
def test_a_finished_run_that_lost_a_file_is_not_called_unchanged(finished, words, name) -> None:
    (finished / name).unlink()
    done = run(*words, "--out", finished, "--resume", "auto", check=2)
    assert f"is finished, but {name} is lost; restore it" in done.stderr


def test_a_finished_folder_whose_weights_are_cut_is_not_called_unchanged(
    finished, words, tmp_path
) -> None:
    exported = tmp_path / "dense"
    run("export", finished, "--format", "dense", "--out", exported)
    for path in (exported / "model.safetensors", finished / "sliderquant.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        if path.parent == exported:
            done = run("export", finished, "--format", "dense", "--out", exported, check=2)
        else:
            done = run(*words, "--out", finished, "--resume", "auto", check=2)
        assert f"{path.name} is damaged" in done.stderr
        path.write_bytes(whole)


def test_a_folder_in_use_is_refused_at_once(finished, words, tmp_path) -> None:
    before = contents(finished)
    with locked_folder(finished), locked_folder(tmp_path / "new"):
        for out in (finished, tmp_path / "new"):
            done = run(*words, "--out", out, "--resume", "auto", check=2)
            assert f"{out} is in use by another run; wait" in done.stderr
        done = run("export", finished, "--out", tmp_path / "new", check=2)
        assert "is in use by another run" in done.stderr
    assert contents(finished) == before
    assert not (tmp_path / "new").exists()


def test_a_lock_that_a_killed_run_left_is_no_run(words, tmp_path) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "lock").touch()
    run(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "run" / "lock").exists()


def test_an_export_belongs_to_its_source_and_format(finished, words, tmp_path) -> None:
    out = tmp_path / "dense"
    first = json.loads(run("export", finished, "--format", "dense", "--out", out, "--json").stdout)
    before = contents(out)
    done = run("export", finished, "--format", "dense", "--out", out, "--json")
    assert "is finished already and unchanged" in done.stderr
    assert json.loads(done.stdout) == first
    assert contents(out) == before

    # Another format, another source.
    for more in (["--format", "compressed-tensors"], ["--format", "dense", "--container-bits", 8]):
        assert (
            "holds a model already" in run("export", finished, *more, "--out", out, check=2).stderr
        )
    run(*words, "--wbits", 3, "--out", tmp_path / "other")
    done = run("export", tmp_path / "other", "--format", "dense", "--out", out, check=2)
    assert "holds a model already" in done.stderr
    assert contents(out) == before

    # A kill between the model and its card.
    (out / "README.md").unlink()
    run("export", finished, "--format", "dense", "--out", out)
    assert contents(out)["README.md"][0] == before["README.md"][0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 412316860416 bytes. Error code 12"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
        MemoryError(),
    ],
    ids=["host", "device", "python"],
)  # fmt: skip
def test_no_memory_is_one_line_with_what_helps(words, tmp_path, monkeypatch, error) -> None:
    def fail(job) -> None:
        raise error

    monkeypatch.setattr(quantize_command, "calibrate_saved", fail)
    done = run(*words, "--out", tmp_path / "out", check=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: memory ran out (")
    assert all(name in line for name in ("--cache disk", "--batch-size", "--nsamples", "--seqlen"))


def test_the_system_itself_says_that_memory_runs_out(words, tmp_path, monkeypatch) -> None:
    """An allocation that no machine grants, in the process itself."""
    monkeypatch.setattr(quantize_command, "calibrate_saved", lambda job: torch.empty(2**60))
    done = run(*words, "--out", tmp_path / "out", check=2)
    assert "memory ran out" in done.stderr
    shutil.rmtree(tmp_path / "out")


def test_what_a_kill_before_the_first_note_leaves_is_no_other_run(tmp_path) -> None:
    run_folder = tmp_path / "out" / "run"
    (run_folder / "cache" / "rank-0").mkdir(parents=True)
    for name in ("lock", ".settings.json.7.tmp"):
        (run_folder / name).touch()
    check_resumable(tmp_path / "out", "never")
    check_resumable(tmp_path / "out", "auto")
    (run_folder / "report.json").touch()
    for resume, message in (("never", "is not empty"), ("auto", "holds no run")):
        with pytest.raises(InputError, match=message):
            check_resumable(tmp_path / "out", resume)
