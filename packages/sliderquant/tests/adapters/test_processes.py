"""Calibration by two gloo processes against one."""

import contextlib
import io
import json
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

from effml_common.cli import main
from effml_common.errors import InputError
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.processes import device_with_float64, process_group
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate

WINDOWS = [[0, 1], [1, 2]]


def calibrated(model, tokens, out, **changes) -> None:
    """Calibrate, and save parameters and every learning rate to a file of this process."""
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            result = super().step(closure)
            self.last = self
            return result

    config = SliderConfig(
        method="slider",
        wbits=3,
        group_size=8,
        epochs=4,
        nsamples=4,
        seqlen=12,
        batch_size=3,
        lr_lora=1e-3,
        **changes,
    )
    decoder = TransformersDecoder(model)
    dtype = next(model.parameters()).dtype
    learnables = [made.to(dtype) for made in fresh_learnables(decoder, config, dtype)]
    original, torch.optim.AdamW = torch.optim.AdamW, Recorder
    try:
        calibrate(decoder, tokens, WINDOWS, learnables, config)
    finally:
        torch.optim.AdamW = original
    state = {
        f"{b}.{n}": v for b, made in enumerate(learnables) for n, v in made.state_dict().items()
    }
    torch.save({"rates": rates, "state": state}, out)


def forked(rank: int, port: int, work) -> int:
    """Run ``work`` in a process that torchrun would have made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)
        code = 0
    os._exit(code)


def run_two(work) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(rank, port, work) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (torch.float64, 1e-6)],
)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_learn_what_one_learns(
    name, dtype, tolerance, tiny, tokens, tmp_path
) -> None:
    model = tiny(name).to(dtype)
    if dtype is torch.float64 and model.config._experts_implementation is not None:
        model.config._experts_implementation = "eager"

    def work(rank: int) -> None:
        with process_group("cpu") as device:
            assert device == torch.device("cpu")
            assert distributed.get_world_size() == 2
            calibrated(model, tokens, tmp_path / f"rank-{rank}")

    run_two(work)
    calibrated(model, tokens, tmp_path / "alone")
    alone, first, second = (
        torch.load(tmp_path / file, weights_only=True) for file in ("alone", "rank-0", "rank-1")
    )
    # Two samples in batches of three: the second batch has one, and a process without a sample.
    assert len(alone["rates"]) == 2 * 2 * 2 * 2
    assert first["rates"] == second["rates"] == alone["rates"]
    per_window = alone["rates"][:4]
    assert per_window == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])  # the next would be zero
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        torch.testing.assert_close(first["state"][key], value, rtol=tolerance, atol=tolerance)


def test_one_process_joins_nothing(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not distributed.is_initialized()


@pytest.mark.parametrize("cache", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_quantize_under_torchrun_writes_once_and_gives_the_same_model(
    cache, save, tmp_path
) -> None:
    model, text = save("llama"), tmp_path / "text.txt"
    words = [
        "quantize", model, "--calib", text, "--eval-text", text, "--group-size", 8, "--nsamples", 4,
        "--seqlen", 16, "--method", "slider", "--epochs", 2, "--batch-size", 2, "--cache", cache,
        "--quiet",
    ]  # fmt: skip

    def quantize(out: Path) -> int:
        command = [str(word) for word in (*words, "--out", out)]
        with contextlib.redirect_stdout(io.StringIO()):
            return main("sliderquant", "sliderquant", COMMANDS, command)

    def work(rank: int) -> None:
        assert quantize(tmp_path / "two") == 0

    run_two(work)
    assert quantize(tmp_path / "one") == 0
    one, two = (
        json.loads((tmp_path / name / "run" / "report.json").read_text()) for name in ("one", "two")
    )
    for first, second in zip(one["rows"], two["rows"], strict=True):
        for metric, value in first["metrics"].items():
            assert second["metrics"][metric]["mean"] == pytest.approx(value["mean"], rel=1e-3)
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]
    lines = [
        (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        for name in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) == 8


def test_mps_is_refused_where_double_precision_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with process_group("mps") as device:
        assert device == torch.device("mps")
    with pytest.raises(InputError, match="no float64"):
        device_with_float64("mps")
    with pytest.raises(InputError, match="no float64"), process_group("mps", float64=True):
        pass
