"""The examples run as they are written, on tiny models, and come out as they say."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import sliderquant

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "compare_methods_on_own_text",
    "find_blocks_that_suffer_most",
    "pack_llama_into_two_bits",
    "quantize_llama_to_four_bits",
    "quantize_model_in_memory",
}
Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not beside these tests"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example in the folder of the test, on the CPU; its global names come back."""

    def run(name: str, *words: Any) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


@pytest.fixture
def folder(save) -> Path:
    """A random Llama of two blocks whose layers all have 64 inputs; ``text.txt`` lies beside it."""
    return save("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=2)


def levels_per_group(weight: torch.Tensor, group_size: int) -> int:
    """Return the most values that any group of a weight holds."""
    groups = weight.detach().unflatten(1, (-1, group_size)).flatten(0, 1)
    return max(len(group.unique()) for group in groups)


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


def test_four_bits_are_near_full_precision_and_load_in_transformers(run, save, tmp_path) -> None:
    source = save("llama", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    words = (source, tmp_path / "text.txt", tmp_path / "text.txt", 16, 64)
    names = run("quantize_llama_to_four_bits", *words)

    rows = {row.name: row.metrics for row in names["report"].rows}
    assert list(rows) == ["full precision", "round-to-nearest", "compensated rounding"]
    full, nearest, ours = (row["perplexity text.txt"][0] for row in rows.values())
    assert abs(ours - full) < abs(nearest - full)
    assert rows["compensated rounding"]["bits per weight"] == [4 + 32 / 128]  # float32 scales
    assert levels_per_group(names["model"].model.layers[0].mlp.up_proj.weight, 128) <= 16
    assert names["ids"].shape[1] > names["prompt"]["input_ids"].shape[1]


def test_two_bits_stay_packed_and_the_copy_holds_the_same_values(run, folder, tmp_path) -> None:
    names = run("pack_llama_into_two_bits", folder, tmp_path / "text.txt", 8, 64)
    full = AutoModelForCausalLM.from_pretrained(folder)
    assert names["held"] < sum(p.nbytes for p in full.parameters()) / 2
    assert isinstance(names["text"], str)

    packed = sliderquant.load(tmp_path / "llama-w2-native")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-w2-served")
    tokens = torch.arange(1, 33).view(2, 16)
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, served(tokens).logits)
    assert levels_per_group(served.model.layers[0].mlp.up_proj.weight, 64) <= 4
    name = "model.layers.0.mlp.up_proj.weight_packed"
    with safe_open(tmp_path / "llama-w2-served/model.safetensors", framework="pt") as file:
        assert file.get_slice(name).get_shape()[1] == 64 * 4 // 32  # containers of 4 bits


def test_every_method_is_compared_on_the_same_text(run, folder, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    perplexities = run("compare_methods_on_own_text", folder, text, text, 2, 16, 64, 2)[
        "perplexities"
    ]
    rows = ["full precision", "round-to-nearest", "compensated rounding", "SliderQuant (slider)"]
    assert list(perplexities) == rows
    full, nearest, compensated, slider = perplexities.values()
    assert abs(compensated - full) < abs(nearest - full)
    assert slider != nearest
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].removeprefix("lowest after full precision: ") in rows[1:]
    assert (tmp_path / "compared-slider/config.json").exists()


def test_blocks_are_ranked_by_what_rounding_them_does(run, folder, tmp_path, capsys) -> None:
    names = run("find_blocks_that_suffer_most", folder, tmp_path / "text.txt", 2, 64)
    assert set(names["damage"]) == {"block 0", "block 1"}
    first = max(names["damage"], key=names["damage"].get)
    assert capsys.readouterr().out.startswith(f"{first}: KL ")
    report = json.loads((tmp_path / "suffering/run/report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["block 0", "block 1"]


def test_the_model_in_memory_has_four_bits_and_nearly_the_same_loss(run, folder, tmp_path) -> None:
    names = run("quantize_model_in_memory", folder, tmp_path / "text.txt", 22, 64)
    assert abs(names["after"] - names["before"]) < 0.05 * names["before"]
    original = AutoModelForCausalLM.from_pretrained(folder)
    layers = zip(names["model"].model.layers, original.model.layers, strict=True)
    for quantized, full in layers:
        weight = quantized.self_attn.o_proj.weight
        assert levels_per_group(weight, 64) <= 16
        assert not torch.equal(weight, full.self_attn.o_proj.weight)
        assert torch.equal(quantized.input_layernorm.weight, full.input_layernorm.weight)

    # What it saved computes the same.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "llama-w4-from-memory")
    with torch.no_grad():
        loss = float(saved(input_ids=names["held_out"], labels=names["held_out"]).loss)
    assert loss == pytest.approx(names["after"], rel=1e-6)
