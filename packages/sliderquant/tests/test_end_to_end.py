"""Every family from a saved directory to a quantized one that transformers loads."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sliderquant.commands.quantize import quantize
from sliderquant.config import QuantizeConfig
from sliderquant.method.learnables import BlockLearnables

# Biases, norms between a layer and the stream, fused and partly rotated weights, experts.
FIRST_FAMILIES = ("llama", "gemma3", "phi4", "qwen3_moe")


def run(directory: Path, **changes):
    """Quantize beside the source; returns the folder and the report."""
    out = directory.with_name(changes.pop("out", "out"))
    text = str(directory.with_name("text.txt"))
    base = {
        "model": str(directory), "calib": (text,), "eval_text": (text,), "out": str(out),
        "group_size": 8, "nsamples": 4, "seqlen": 16, "batch_size": 2, "format": "dense",
    }  # fmt: skip
    if changes.get("method") == "combined":
        base |= {"lr_range": 1e-2}
    elif changes.get("method") != "compensated":
        base |= {"method": "slider", "epochs": 2, "lr_lora": 1e-3, "min_expert_tokens": 8}
    return out, quantize(QuantizeConfig(**{**base, **changes}))


def perplexity(directory: Path, **kwargs) -> float:
    """Of a directory that transformers loads, on the whole text in chunks of the model's limit."""
    from sliderquant.adapters.files import load_tokenizer
    from sliderquant.adapters.simulation import model_logits
    from sliderquant.adapters.text import chunks
    from sliderquant.method.metrics import perplexity as measured

    model = AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()
    text = Path(directory).with_name("text.txt").read_text()
    ids = load_tokenizer(directory)(text, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        return measured(model_logits(model), list(chunks(ids, 64)))


def simulated(report, row: int = -1) -> float:
    return report.rows[row].metrics["perplexity text.txt"][0]


def test_reloaded_model_equals_the_simulated_one(family, save) -> None:
    directory = save(family)
    out, report = run(directory, wbits=2, sym=False)
    assert perplexity(out) == pytest.approx(simulated(report), rel=1e-5)
    assert perplexity(directory) == pytest.approx(simulated(report, 0), rel=1e-5)
    assert simulated(report) != pytest.approx(simulated(report, 0), rel=1e-3)


@pytest.mark.parametrize("rotate", ["none", pytest.param("r2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["compensated", "combined"])
def test_compensated_rounding_is_stored_as_it_was_decided(
    method, rotate, family, save, capsys
) -> None:
    directory = save(family)
    changes = {"wbits": 2, "sym": False, "method": method, "rotate": rotate}
    out, report = run(directory, **changes)
    assert re.search(r"calibrating: (\d+)/\1 \(100 %\)", capsys.readouterr().err)
    windows = " + windows (slider)" if method == "combined" else ""
    assert report.rows[-1].name == f"compensated rounding{windows}"
    assert perplexity(out) == pytest.approx(simulated(report), rel=1e-5)
    assert simulated(report) != pytest.approx(simulated(report, 1), rel=1e-4)


def test_compensated_rounding_holds_codes_of_one_block_unless_they_are_to_be_measured(
    save, monkeypatch
) -> None:
    held = []
    forget = BlockLearnables.forget_codes
    monkeypatch.setattr(
        BlockLearnables, "forget_codes", lambda made: (held.append(made), forget(made))
    )
    out, _ = run(save("llama"), method="compensated", eval_text=())
    assert len(set(map(id, held))) == 3
    assert all(linear.closed_form is None for made in held for linear in made.linears)
    assert perplexity(out) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slider", "compensated", "combined"])
def test_weights_and_activations_with_channel_scaling_and_rotation(family, method, save) -> None:
    """Scaling and rotation go into the weights: without activation rounding the result is near full."""
    directory = save(family)
    rotate = "r2" if family.startswith("gemma") else "both"
    windows = {"epochs": 2, "gamma": 1.0, "lr_scale": 1e-2} if method == "slider" else {}
    out, report = run(directory, wbits=8, abits=8, rotate=rotate, method=method, **windows)
    full, rtn, ours = (simulated(report, row) for row in range(3))
    assert ours == pytest.approx(full, rel=0.02)
    assert rtn == pytest.approx(full, rel=0.02)
    assert perplexity(out) == pytest.approx(full, rel=0.02)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (directory, out)
    )
    if rotate == "both":
        assert not after["tie_word_embeddings"]
    else:
        assert after.get("tie_word_embeddings") == before.get("tie_word_embeddings")


def test_all_at_sixteen_bits_is_the_same_model(family, save) -> None:
    directory = save(family)
    out, _ = run(directory, wbits=16, eval_text=())
    before = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
