"""What quantize reports is what its folder computes, and what every export of it computes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from effml_common.cli import main
from sliderquant.adapters.loading import load_any
from sliderquant.cli import COMMANDS
from sliderquant.commands import _gguf
from sliderquant.commands.eval import text_perplexity

SIZES = {"hidden_size": 64, "intermediate_size": 96}
FAST = ["--nsamples", 8, "--seqlen", 32, "--format", "native"]
TRAINED = ["--method", "slider", "--epochs", 2]


def run(*words: object, code: int = 0) -> None:
    assert main("sliderquant", "sliderquant", COMMANDS, [*map(str, words)]) == code


@pytest.fixture
def quantized(save, tmp_path):
    """Quantizes a tiny bfloat16 model; returns its native folder."""

    def make(family: str, *words: object, **changes) -> Path:
        folder, text = save(family, **SIZES, **changes), tmp_path / "text.txt"
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        out = tmp_path / "native"
        run("quantize", folder, "--calib", text, "--eval-text", text, "--out", out, *FAST, *words)
        return out

    return make


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return load_any(folder).model(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        # Gains and weights that are kept, both scaled: stored in bfloat16 beside float16 scales.
        ("llama", ["--for", "gguf", "--channel-scale", "on", "--ignore", "layers.1.mlp.*"]),
        ("llama", ["--for", "gguf", "--channel-scale", "on", "--ignore", "q_proj", *TRAINED]),
        # Weights that are kept, rotated or scaled, in a model without any codes, too.
        ("llama", ["--group-size", 32, "--rotate", "both", "--ignore", "layers.1.*"]),
        ("llama", ["--group-size", 32, "--wbits", 16, "--abits", 8, *TRAINED]),
        # Packed experts, whose products have the type of the rest.
        ("mixtral", ["--group-size", 32]),
        ("mixtral", ["--wbits", 8, "--abits", 8]),
    ],
)
def test_the_folder_has_the_reported_perplexity(architecture, words, quantized, tmp_path) -> None:
    native = quantized(architecture, *words)
    (name, metric), *_ = json.loads((native / "run" / "report.json").read_text())["rows"][-1][
        "metrics"
    ].items()
    assert name == "perplexity text.txt"
    found = text_perplexity(load_any(native), str(tmp_path / "text.txt"))
    assert found == pytest.approx(metric["mean"], rel=1e-6)


def test_a_dense_folder_keeps_products_with_float16_scales(quantized, tokens, tmp_path) -> None:
    native, dense = quantized("llama", "--for", "gguf"), tmp_path / "dense"
    run("export", native, "--format", "dense", "--out", dense)
    torch.testing.assert_close(logits(dense, tokens), logits(native, tokens), rtol=0, atol=0)


def test_a_dense_block_between_blocks_with_experts_may_be_left_out(
    quantized, tokens, tmp_path
) -> None:
    native = quantized(
        "qwen3_moe", "--group-size", 16, "--ignore", "layers.1.mlp.*", mlp_only_layers=[1]
    )
    packed = tmp_path / "packed"
    run("export", native, "--out", packed)
    torch.testing.assert_close(logits(packed, tokens), logits(native, tokens))


def test_lost_roundings_and_differing_layers_are_said(quantized, tmp_path, capsys) -> None:
    native = quantized("llama", "--wbits", 16, "--abits", 8, *TRAINED, "--group-size", 32)
    capsys.readouterr()
    run("export", native, "--out", tmp_path / "packed")
    assert "no activation is rounded" in capsys.readouterr().err

    run("quantize", tmp_path / "source", "--calib", tmp_path / "text.txt", *FAST, "--group-size", 32,
        "--bits-for", "q_proj=8", "--out", tmp_path / "mixed")  # fmt: skip
    capsys.readouterr()
    run("export", tmp_path / "mixed", "--out", tmp_path / "mixed_packed")
    message = capsys.readouterr().err
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of layers 0-2" in message
    assert "vLLM needs one format" in message


def test_experts_that_are_left_out_have_no_place_in_gptq(quantized, tmp_path, capsys) -> None:
    native = quantized("mixtral", "--group-size", 32, "--ignore", "*experts*")
    run("export", native, "--format", "gptq", "--out", tmp_path / "gptq", code=2)
    assert "no place for fused experts" in capsys.readouterr().err


def test_a_gguf_export_may_be_stopped_after_its_file_appeared(
    model_directory, text_file, tmp_path, monkeypatch, capsys
) -> None:
    native, out = tmp_path / "native", tmp_path / "gguf"
    run("quantize", model_directory, "--calib", text_file, *FAST, "--for", "gguf", "--out", native)

    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_gguf, "GgufCost", stop)
        run("export", native, "--format", "gguf", "--out", out, code=130)
    run("export", native, "--format", "gguf", "--out", out)
    assert (out / "README.md").is_file()

    # What is finished is not measured again, and that is said.
    capsys.readouterr()
    run("export", native, "--format", "gguf", "--out", out, "--text", text_file)
    assert "choose another --out" in capsys.readouterr().err


def test_a_family_without_a_file_is_named_before_the_work(quantized, capsys) -> None:
    quantized("mistral", "--for", "gguf")
    message = capsys.readouterr().err
    assert "export --format gguf will refuse this model: GGUF files are written for" in message


@pytest.mark.parametrize(
    ("name", "way"), [("gguf", "--for gguf --format native"), ("gptq", "--format native")]
)
def test_quantize_names_the_way_to_formats_of_export(name, way, capsys) -> None:
    run("quantize", "m", "--calib", "t", "--format", name, code=2)
    assert capsys.readouterr().err == (
        f"error: format {name} is written by export; use {way}, then "
        f"`sliderquant export --format {name}`\n"
    )


def test_codes_for_llama_cpp_are_timed_in_the_type_of_the_model(
    quantized, tmp_path, capsys
) -> None:
    native = quantized("llama", "--for", "gguf")
    words = ["bench", native, "--prompt", 4, "--repeats", 1, "--out", tmp_path / "bench"]
    run(*words, "--tokens", 2)
    capsys.readouterr()
    run(*words, "--tokens", 64, code=2)
    assert "error: tokens is 64, and the model reads 64 with the prompt; lower --tokens" in (
        capsys.readouterr().err
    )
