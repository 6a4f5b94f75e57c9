"""From quantize to every format and back to a figure, through the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sliderquant
from effml_common.cli import main
from sliderquant.adapters.loading import load_any
from sliderquant.cli import COMMANDS
from sliderquant.commands._model_card import sizes
from sliderquant.commands.eval import evaluate, text_perplexity
from sliderquant.config import EvalConfig


def run(*words: object, code: int = 0) -> None:
    assert main("sliderquant", "sliderquant", COMMANDS, [*map(str, words), "--quiet"]) == code


@pytest.fixture(scope="module")
def native(model_directory, text_file, held_out_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("formats") / "w2-native"
    run(
        "quantize", model_directory, "--calib", text_file, "--eval-text", held_out_file, "--out", out,
        "--format", "native", "--wbits", 2, "--group-size", 64, "--no-sym", "--nsamples", 4,
        "--seqlen", 64, "--method", "slider", "--epochs", 2, "--batch-size", 4, "--lr-lora", "3e-3",
    )  # fmt: skip
    return out


@pytest.mark.slow
def test_every_format_has_the_perplexity_that_quantize_reported(
    native, held_out_file, tmp_path
) -> None:
    reported = json.loads((native / "run" / "report.json").read_text())["rows"][-1]["metrics"]
    want = reported[f"perplexity {held_out_file.name}"]["mean"]
    folders = [native]
    for kind in ("compressed-tensors", "dense"):
        folders.append(tmp_path / kind)
        run("export", native, "--format", kind, "--out", tmp_path / kind)
    for folder in folders:
        config = EvalConfig(
            model=str(folder), text=(str(held_out_file),), out=str(tmp_path / f"eval {folder.name}")
        )
        (value,) = evaluate(config).rows[0].metrics[f"perplexity {held_out_file.name}"]
        assert value == pytest.approx(want, rel=1e-5), folder
        loaded = load_any(folder)
        assert text_perplexity(loaded, str(held_out_file)) == value
        in_memory = evaluate(config, loaded).rows[0].metrics
        assert next(iter(in_memory.values())) == [value]


def test_the_native_model_is_small_and_writes_text(native, model_directory) -> None:
    size = sizes(native)
    # The fixture is stored in float32, so a scale takes 4 bytes: 2 + (32 + 2) / 64 bits.
    assert 16 * size["linears"] / size["bfloat16"] == pytest.approx(2 + 34 / 64, rel=0.03)
    dense = load_file(model_directory / "model.safetensors")
    assert size["bfloat16"] == sum(2 * t.numel() for n, t in dense.items() if "proj" in n)
    model = sliderquant.load(native)
    tokenizer = load_any(native).tokenizer
    ids = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=5)
    assert isinstance(tokenizer.decode(ids[0]), str)


def test_the_card_tells_what_a_reader_must_know(
    native, model_directory, text_file, tmp_path
) -> None:
    out = tmp_path / "packed"
    run("export", native, "--out", out, "--container-bits", 4)
    for folder, loading in ((native, "sliderquant.load"), (out, "from_pretrained")):
        card = (folder / "README.md").read_text()
        for needed in (loading, "W2 g64 asym", text_file.name, "sha256", "perplexity", "torch 2."):
            assert needed in card, (folder, needed)
        assert "the tokenizer puts nothing in front of a text" in card
        assert str(native.parent) not in card
        assert f'base_model: "{model_directory.name}"' in card
        assert "epochs 2" in card
        assert "lr_range" not in card  # no setting of this method
    assert "vllm serve" in card
    assert "not run" in card
    assert "fewer than 4 bits" not in card
    run("export", native, "--out", tmp_path / "two")
    assert "--container-bits 4" in (tmp_path / "two" / "README.md").read_text()
    assert (
        load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"].shape[1]
        == 8
    )


def test_tasks_run_on_a_packed_model_from_the_command_line(native, tmp_path, capsys) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "import os\\n"}\n{"text": "def f(x):\\n"}\n')
    (tmp_path / "task.yaml").write_text(
        "task: rolling\ndataset_path: json\n"
        "dataset_kwargs:\n  data_files: {test: data.jsonl}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\nmetadata: {version: 1.0}\n"
    )
    run("eval", native, "--tasks", tmp_path / "task.yaml", "--out", tmp_path / "e", "--json")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["metrics"]["rolling v1.0 bits_per_byte"]["mean"] < 8
    assert math.isfinite(row["metrics"]["rolling v1.0 bits_per_byte"]["mean"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "NATIVE"], "nothing to evaluate on"),
        (["eval", "missing", "--text", "TEXT"], "does not exist"),
        (["eval", "NATIVE", "--tasks", "missing.yaml"], "does not exist"),
        (["eval", "NATIVE", "--text", "TEXT", "--device", "warp"], "device 'warp'"),
        (["sensitivity", "NATIVE", "--text", "TEXT"], "quantized already"),
        (["sensitivity", "MODEL", "--text", "TEXT", "--group-size", "48"], "does not divide"),
        (["export", "MODEL"], "no native model"),
        (["export", "NATIVE", "--out", "NATIVE"], "holds a model already"),
        (["export", "NATIVE", "--container-bits", "5"], "container_bits is 5; give 4, 8 or none"),
        (["quantize", "NATIVE", "--calib", "TEXT"], "quantized already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words, message, native, model_directory, held_out_file, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"NATIVE": native, "MODEL": model_directory, "TEXT": held_out_file}
    run(*(names.get(word, word) for word in words), code=2)
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "; " in line
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_stored_type_may_be_computed_in(native, held_out_file) -> None:
    assert load_any(native, upcast=False).model.dtype == torch.float32
