"""Calibration by two gloo processes against one."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sliderquant_processes import calibrate_folder, round_folder
from torch import distributed

from effml_common.cli import main
from effml_common.errors import InputError
from effml_common.locking import locked_folder
from sliderquant.adapters.processes import device_with_float64, process_group
from sliderquant.cli import COMMANDS
from sliderquant.commands import quantize as quantize_command
from sliderquant.config import QuantizeConfig

SCRIPT = Path(__file__).parents[1] / "sliderquant_processes.py"


def in_two(*words: object) -> dict[str, Any]:
    """How to start a script, or with "-m" a module, in two processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, *map(str, words)]
    return {"args": command, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


def run_two(*words: object) -> None:
    """Run a script or a module in two processes."""
    done = subprocess.run(**in_two(*words), capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-6)],
)
def test_two_processes_learn_what_one_learns(dtype, tolerance, tiny, tokens, tmp_path) -> None:
    folders = [tmp_path / name for name in ("llama", "mixtral")]
    for folder in folders:
        tiny(folder.name).to(dtype).save_pretrained(folder / "model")
        torch.save(tokens, folder / "tokens.pt")
    run_two(SCRIPT, "calibrate", *folders)

    for folder in folders:
        calibrate_folder(folder, "alone")
        alone, first, second = (
            torch.load(folder / file, weights_only=True) for file in ("alone", "rank-0", "rank-1")
        )
        # Four samples in batches of three: the second batch has one, and a process without a sample.
        assert len(alone["rates"]) == 2 * 2 * 2 * 2
        assert first["rates"] == second["rates"] == alone["rates"]
        per_window = alone["rates"][:4]
        assert per_window == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])  # the next would be zero
        for key, value in alone["state"].items():
            assert torch.equal(first["state"][key], second["state"][key]), (folder.name, key)
            torch.testing.assert_close(first["state"][key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_processes_round_what_one_rounds(tiny, tmp_path) -> None:
    # 17 samples, of which the last three are held out: neither part can be halved.
    generator = torch.Generator().manual_seed(3)
    folders = [tmp_path / name for name in ("llama", "gemma3", "qwen3_moe")]
    for folder in folders:
        tiny(folder.name, hidden_size=64, intermediate_size=192).save_pretrained(folder / "model")
        torch.save(torch.randint(1, 90, (17, 32), generator=generator), folder / "tokens.pt")
    run_two(SCRIPT, "round", *folders)

    for folder in folders:
        round_folder(folder, "alone")
        alone, first, second = (
            torch.load(folder / file, weights_only=True) for file in ("alone", "rank-0", "rank-1")
        )
        for name, value in alone["moments"].items():
            assert torch.equal(first["moments"][name], second["moments"][name])
            torch.testing.assert_close(first["moments"][name], value, rtol=1e-9, atol=1e-9)
        assert first["strengths"] == second["strengths"]
        assert first["strengths"] == pytest.approx(alone["strengths"], abs=1e-3)

        # Samples, regressions and rows are shared: each computes little more than half.
        codes, others, same = (
            torch.cat([c.flatten() for c in r["codes"]]) for r in (alone, first, second)
        )
        assert torch.equal(others, same)
        assert (codes != others).double().mean() < 1e-4
        assert max(first["flops"], second["flops"]) < 0.6 * alone["flops"]
        assert first["solved"] == second["solved"] == alone["solved"] / 2 > 0


def test_one_process_joins_nothing(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not distributed.is_initialized()


def test_processes_without_a_sample_are_refused_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["quantize", "model", "--calib", "text.txt", "--method", "slider", "--out", out]
    assert main("sliderquant", "sliderquant", COMMANDS, list(map(str, words))) == 2
    message = "batch_size is 1 and there are 2 processes; give --batch-size 2 or more"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "batch_size"), [("slider", 2), ("combined", 2), ("compensated", 1)]
)
def test_processes_that_get_samples_are_welcome(method, batch_size, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = []
    monkeypatch.setattr(quantize_command, "process_group", lambda *words, **more: joined.append(1))
    config = QuantizeConfig(model="m", calib=("t",), method=method, batch_size=batch_size)
    with pytest.raises((TypeError, AttributeError)):  # the stand-in is no context
        quantize_command.quantize(config)
    assert joined == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "cache", "windows"),
    [("slider", "memory", 8), ("slider", "disk", 8), ("combined", "disk", 4)],
)
def test_quantize_under_torchrun_writes_once_and_gives_the_same_model(
    method, cache, windows, save, tmp_path
) -> None:
    model, text = save("llama"), tmp_path / "text.txt"
    words = [
        model, "--calib", text, "--eval-text", text, "--group-size", 8, "--nsamples", 4,
        "--seqlen", 16, "--method", method, "--batch-size", 2, "--cache", cache, "--quiet",
    ]  # fmt: skip
    words += ["--epochs", 2] if method == "slider" else ["--lr-range", 1e-2]
    run_two("-m", "sliderquant", "quantize", *words, "--out", tmp_path / "two")
    command = ["quantize", *map(str, words), "--out", str(tmp_path / "one")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main("sliderquant", "sliderquant", COMMANDS, command) == 0

    one, two = (
        json.loads((tmp_path / name / "run" / "report.json").read_text()) for name in ("one", "two")
    )
    # Sums in another order flip a few codes of so small a model.
    tolerance = 1e-3 if method == "slider" else 2e-2
    for first, second in zip(one["rows"], two["rows"], strict=True):
        for metric, value in first["metrics"].items():
            assert second["metrics"][metric]["mean"] == pytest.approx(value["mean"], rel=tolerance)
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]
    lines = [
        (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        for name in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) == windows


@pytest.mark.slow
@pytest.mark.timeout(900)  # three times two processes, each of which imports everything
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("signum", "victim"),
    [(signal.SIGKILL, "torchrun"), (signal.SIGKILL, "second"), (signal.SIGTERM, "first")],
)
def test_all_processes_end_with_one_and_a_resumed_run_ends_with_the_same_bytes(
    signum, victim, save, tmp_path
) -> None:
    model, text, killed = save("llama"), tmp_path / "text.txt", tmp_path / "killed"
    words = [
        "-m", "sliderquant", "quantize", model, "--calib", text, "--group-size", 8, "--nsamples", 8,
        "--seqlen", 16, "--method", "slider", "--batch-size", 2, "--epochs", 8, "--resume", "auto",
    ]  # fmt: skip
    run_two(*words, "--out", tmp_path / "whole")

    # One of them is lost after a window.
    with (tmp_path / "err").open("w") as err:
        torchrun = subprocess.Popen(**in_two(*words, "--out", killed), stdout=err, stderr=err)
        while not (killed / "run" / "checkpoints" / "step-1").exists():
            assert torchrun.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.01)
        workers = workers_of(torchrun.pid)
        os.kill({"torchrun": torchrun.pid, **workers}[victim], signum)
        assert torchrun.wait(timeout=120) != 0
    end = time.monotonic() + 120
    while any(Path(f"/proc/{worker}").exists() for worker in workers.values()):
        assert time.monotonic() < end, "a process outlives torchrun"
        time.sleep(0.01)
    said = (tmp_path / "err").read_text()
    assert said.count("\nerror: ") <= 2, said
    assert "sliderquant/commands" not in said, said  # no traceback of ours

    # The folder is free, and nothing is lost.
    with locked_folder(killed):
        assert not (killed / "config.json").exists()
    run_two(*words, "--out", killed)
    for name in ("model.safetensors", "config.json", "run/metrics.jsonl"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def workers_of(torchrun: int) -> dict[str, int]:
    """Numbers of the two processes that torchrun started, by their order."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    names, found = {"RANK=0": "first", "RANK=1": "second"}, {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found.update({names[each]: child for each in environment if each in names})
    return found


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed "
                         "by peer [127.0.0.1]:17290. This is typically caused by a crash."),
            "Connection closed by peer [127.0.0.1]:17290",
        ),
        (distributed.DistNetworkError("The client socket has timed out"), "The client socket has"),
    ],
    ids=["gloo", "store"],
)  # fmt: skip
def test_a_lost_process_is_one_line(error, reason, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed, name, lambda *words, **more: None)
    with pytest.raises(InputError) as caught, process_group("cpu"):
        raise error
    assert str(caught.value).startswith(f"another process of this run is gone ({reason}")
    assert str(caught.value).endswith("run again with --resume auto")
    with pytest.raises(RuntimeError, match="a fault"), process_group("cpu"):
        raise RuntimeError("a fault of the program")


def test_mps_is_refused_where_double_precision_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with process_group("mps") as device:
        assert device == torch.device("mps")
    with pytest.raises(InputError, match="no float64"):
        device_with_float64("mps")
    with pytest.raises(InputError, match="no float64"), process_group("mps", float64=True):
        pass
