"""The same results on a card as on the CPU: run with -m cuda where there is one."""

import json

import pytest
import torch

from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.simulation import (
    fresh_learnables,
    model_logits,
    simulated_logits,
    simulated_weights,
)
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate
from sliderquant.method.metrics import perplexity

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WINDOWS = [[0, 1], [1, 2]]


def calibrated(model, tokens, device: str, **settings):
    """Calibrate on a device; returns learnables, simulated weights and the logits, on the host."""
    decoder = TransformersDecoder(model.to(device))
    config = SliderConfig(group_size=8, nsamples=4, seqlen=12, batch_size=2, **settings)
    learnables = fresh_learnables(decoder, config, torch.float32)
    calibrate(decoder, tokens, WINDOWS, learnables, config)
    weights = simulated_weights(decoder, learnables)
    assert {w.device.type for part in weights for w in part.values()} == {device}
    logits = simulated_logits(decoder, weights)(tokens).cpu()
    return learnables, [{n: w.cpu() for n, w in part.items()} for part in weights], logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi4"])
@pytest.mark.parametrize("abits", [16, 8])
def test_compensated_rounding_finds_the_codes_of_the_cpu(name, abits, tiny, tokens) -> None:
    settings = {"wbits": 4, "method": "compensated", "abits": abits}
    here, _, expected = calibrated(tiny(name), tokens, "cpu", **settings)
    there, _, logits = calibrated(tiny(name), tokens, DEVICE, **settings)
    same = [
        (ours.closed_form.codes == theirs.closed_form.codes).float().mean().item()
        for first, second in zip(here, there, strict=True)
        for ours, theirs in zip(first.linears, second.linears, strict=True)
    ]
    # Another order of sums turns a code that lies between two, and with it some that follow.
    assert min(same) > 0.9
    assert sum(same) / len(same) > 0.97
    exact = TransformersDecoder(tiny(name))
    wanted = simulated_logits(exact, None)(tokens)
    errors = [(found - wanted).square().mean().item() for found in (expected, logits)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_windows_learn_what_they_learn_on_the_cpu(name, tiny, tokens) -> None:
    settings = {"wbits": 3, "method": "slider", "epochs": 4, "lr_lora": 1e-3}
    here, _, expected = calibrated(tiny(name), tokens, "cpu", **settings)
    there, _, logits = calibrated(tiny(name), tokens, DEVICE, **settings)
    for first, second in zip(here, there, strict=True):
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            # AdamW's first steps have the sign of the gradient, also where that is rounding noise; a
            # card multiplies in bfloat16.
            near = (ours - theirs.cpu()).abs() < 1e-3 + 0.02 * ours.abs()
            assert near.float().mean() > 0.8
    exact = simulated_logits(TransformersDecoder(tiny(name)), None)(tokens)
    errors = [(found - exact).square().mean().item() for found in (expected, logits)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def quantize(model, text, out, *words: str) -> dict:
    """Run the command and return its report."""
    command = ["quantize", str(model), "--calib", str(text), "--eval-text", str(text), "--quiet"]
    command += ["--group-size", "8", "--nsamples", "4", "--seqlen", "16", "--out", str(out), *words]
    assert main("sliderquant", "sliderquant", COMMANDS, command) == 0
    return json.loads((out / "run" / "report.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--cache", "disk", "--rotate", "r2", "--format", "dense"],
        ["--method", "slider", "--epochs", "2", "--batch-size", "2", "--cache", "disk"],
    ],
)
def test_the_quantized_folder_is_as_good_as_the_cpus(words, save, tmp_path) -> None:
    model, text = save("llama"), tmp_path / "text.txt"
    here = quantize(model, text, tmp_path / "cpu", "--device", "cpu", *words)
    there = quantize(model, text, tmp_path / "card", "--device", DEVICE, *words)
    assert there["environment"]["device"].startswith(DEVICE)
    for first, second in zip(here["rows"], there["rows"], strict=True):
        for metric, value in first["metrics"].items():
            assert second["metrics"][metric]["mean"] == pytest.approx(value["mean"], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_perplexity_that_it_has_on_the_cpu(dtype, tiny, save, tokens) -> None:
    directory = save("llama")
    tiny("llama").to(torch.bfloat16).save_pretrained(directory)
    values = [
        perplexity(
            model_logits(load_any(directory, device, upcast=dtype is torch.float32).model), [tokens]
        )
        for device in ("cpu", DEVICE)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-4 if dtype is torch.float32 else 0.02)


def test_bench_times_the_kernel(save, tmp_path) -> None:
    model, text = save("llama", hidden_size=64), tmp_path / "text.txt"
    quantize(model, text, tmp_path / "native", "--device", DEVICE, "--format", "native")
    words = ["bench", str(tmp_path / "native"), "--prompt", "8", "--tokens", "3", "--repeats", "1"]
    words += ["--device", DEVICE, "--out", str(tmp_path / "bench"), "--quiet"]
    assert main("sliderquant", "sliderquant", COMMANDS, words) == 0
    report = json.loads((tmp_path / "bench" / "run" / "report.json").read_text())
    assert "without dequantizing" in report["notes"][0]
