"""Model folders as users have them: what is quantized is what transformers loads from them."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaModel,
)

from effml_common.cli import main
from effml_common.errors import InputError
from sliderquant.adapters.hub import model_directory, model_name
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.simulation import model_logits
from sliderquant.adapters.text import chunks, read_tokens
from sliderquant.cli import COMMANDS
from sliderquant.method.metrics import perplexity

SMALL = ["--group-size", "8", "--nsamples", "4", "--seqlen", "16", "--format", "dense"]


def run(*words: object, check: int = 0) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("sliderquant", "sliderquant", COMMANDS, list(map(str, words)))
    assert code == check, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def quantize(directory: Path, out: Path, *more: object, text: Path | None = None, check: int = 0):
    text = text or out.parent / "text.txt"
    words = ["--calib", text, "--eval-text", text, "--out", out, *SMALL, *more, "--json"]
    done = run("quantize", directory, *words, check=check)
    done.perplexities = [
        next(metric["mean"] for name, metric in row["metrics"].items() if name.startswith("perpl"))
        for row in (json.loads(done.stdout)["rows"] if check == 0 else ())
    ]
    return done


def perplexity_in_transformers(model, directory: Path, text: Path) -> float:
    """Perplexity of a model that transformers has loaded, without this package's loaders."""
    tokens = read_tokens([str(text)], load_any(directory).tokenizer, model)
    return perplexity(model_logits(model.eval()), chunks(tokens, 64))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("different", [True, False])
def test_a_head_beside_tied_embeddings_is_what_transformers_makes_of_it(
    save, tmp_path, different
) -> None:
    directory, text = save("llama", tie_word_embeddings=True), tmp_path / "text.txt"

    def add_head(tensors) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0) if different else embedding.clone()

    edit_weights(directory, add_head)
    done = quantize(directory, tmp_path / "out")
    full, _, ours = done.perplexities
    assert ("the head is kept" in done.stderr) == different

    # Before and after, as transformers loads the folders.
    for folder, reported in ((directory, full), (tmp_path / "out", ours)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        value = perplexity_in_transformers(model, folder, text)
        assert reported == pytest.approx(value, rel=1e-4), folder
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == different
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
        != different
    )


def test_a_base_model_is_quantized_where_its_head_is_the_embedding(save, tmp_path) -> None:
    directory = save("llama", tie_word_embeddings=True)
    quantize(directory, tmp_path / "whole")
    base = LlamaModel.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    base.save_pretrained(directory)
    assert "layers.0.mlp.up_proj.weight" in load_file(directory / "model.safetensors")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaModel"]

    # The same bytes as from the folder of the whole model.
    quantize(directory, tmp_path / "out")
    ours, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]

    # Without a tied head there is nothing to predict with.
    edit_config(directory, tie_word_embeddings=False)
    done = quantize(directory, tmp_path / "none", check=2)
    assert "without a head (lm_head.weight)" in done.stderr
    done = run("eval", directory, "--text", tmp_path / "text.txt", "--out", tmp_path / "e", check=2)
    assert "lacks 1 weights, such as lm_head.weight" in done.stderr


def commands(directory: Path, tmp_path: Path) -> list[list[object]]:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    return [
        ["quantize", directory, "--calib", text, "--out", out, *SMALL],
        ["eval", directory, "--text", text, "--out", out],
        ["sensitivity", directory, "--text", text, "--group-size", 8, "--seqlen", 16, "--out", out],
        ["inspect", "--model", directory, "--group-size", 8],
    ]


def test_an_adapter_in_the_folder_is_refused_by_all_commands(save, tmp_path) -> None:
    directory = save("llama")
    (directory / "adapter_config.json").write_text("{}")
    for words in commands(directory, tmp_path):
        assert "merge it first: merge_and_unload() of peft" in run(*words, check=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": None},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_what_says_nothing_of_the_weights_changes_nothing(save, tmp_path, changes) -> None:
    directory = save("llama")
    plain = quantize(directory, tmp_path / "plain").perplexities
    edit_config(directory, **changes)
    done = quantize(directory, tmp_path / "out")
    assert done.perplexities == plain
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: config")]
    assert len(warnings) == ("quantization_config" not in changes), done.stderr
    for words in commands(directory, tmp_path)[1:]:
        run(*words)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    value = perplexity_in_transformers(model, tmp_path / "out", tmp_path / "text.txt")
    assert plain[-1] == pytest.approx(value, rel=1e-4)


def test_activations_that_overflow_end_with_3_and_nothing_is_published(save, tmp_path) -> None:
    directory = save("llama")

    # Finite weights: only what the last block adds to the residual stream is too large.
    def overflow(tensors) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] *= 3e38 / 10
        tensors["model.layers.2.mlp.up_proj.weight"] *= 1e5

    edit_weights(directory, overflow)
    for words in commands(directory, tmp_path)[:3]:
        assert "not finite" in run(*words, check=3).stderr, words[0]
        assert not list((tmp_path / "out").glob("*")) or words[0] == "quantize"
        assert not (tmp_path / "out" / "config.json").exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_named(save, tmp_path, file) -> None:
    directory = save("llama")
    path = directory / file
    changes = {"auto_map": {"AutoConfig": "odd.Odd", "AutoTokenizer": ["odd.Odd", None]}}
    changes |= {"model_type": "odd"} if file == "config.json" else {"tokenizer_class": "Odd"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (directory / "odd.py").write_text("raise SystemExit('ran')\n")
    for words in commands(directory, tmp_path)[: 4 if file == "config.json" else 3]:
        done = run(*words, check=2)
        assert "--trust-remote-code" in done.stderr, done.stderr
        assert sum(line.startswith("error") for line in done.stderr.splitlines()) == 1


@pytest.fixture
def cached(save, tmp_path, monkeypatch) -> Path:
    """A tiny model in a cache of the hub, under the id ``org/tiny``, and no network."""
    directory, cache = save("llama"), tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(directory, snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_an_id_is_found_in_the_cache_and_named_on_the_card(cached, tmp_path) -> None:
    assert model_directory("org/tiny") == cached
    by_id = quantize(Path("org/tiny"), tmp_path / "by-id").perplexities
    by_path = quantize(tmp_path / "source", tmp_path / "by-path").perplexities
    assert by_id == by_path
    card = (tmp_path / "by-id" / "README.md").read_text()
    assert 'base_model: "org/tiny"' in card
    assert str(tmp_path) not in card
    for words in commands(Path("org/tiny"), tmp_path)[1:]:
        run(*words)

    # A path that exists wins.
    shutil.copytree(tmp_path / "source", tmp_path / "org" / "tiny")
    assert model_directory("org/tiny") == Path("org/tiny")


def test_a_model_that_is_nowhere_is_one_line(cached, tmp_path, monkeypatch) -> None:
    for words in commands(Path("org/other"), tmp_path):
        done = run(*words, check=2)
        assert "org/other does not exist" in done.stderr
        assert "HF_HUB_OFFLINE is set" in done.stderr
    (cached / "model.safetensors").unlink()
    done = run(*commands(Path("org/tiny"), tmp_path)[0], check=2)
    assert "no safetensors weights" in done.stderr
    run(*commands(Path("org/tiny"), tmp_path)[3])  # inspect reads no weight

    # A name beside other models is a path that was mistyped: nothing is fetched.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sliderquant.adapters.hub.say", pytest.fail)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match=r"models/llmaa does not exist.*check the name"):
        model_directory("models/llmaa")

    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_directory("~/source") == tmp_path / "source"
    assert model_name("~/source") == "source"


@pytest.fixture
def vision(save, tmp_path) -> Path:
    """A tiny random Gemma 3 that also reads images, with the tokenizer of the tiny models."""
    directory = save("gemma3")
    text_config = json.loads((directory / "config.json").read_text())
    vision_config = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text_config, vision_config=vision_config, mm_tokens_per_image=4,
        image_token_index=95, boi_token_index=94, eoi_token_index=93,
    )  # fmt: skip
    torch.manual_seed(3)
    (directory / "model.safetensors").unlink()
    Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_part_of_a_vision_language_model_is_quantized(
    vision, tmp_path, prefix
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"

    def rename(tensors) -> None:
        for name in list(tensors):
            if name.startswith("language_model.model."):
                tensors[prefix + name.removeprefix("language_model.model.")] = tensors.pop(name)

    edit_weights(vision, rename)
    done = quantize(vision, out)
    assert "gemma3 is read for its language part, gemma3_text" in done.stderr
    assert "Only the language part of the gemma3 model" in (out / "README.md").read_text()

    # Full precision is the whole model's on text; the folder holds the language model alone.
    whole = Gemma3ForConditionalGeneration.from_pretrained(vision)
    assert done.perplexities[0] == pytest.approx(
        perplexity_in_transformers(whole, vision, text), rel=1e-4
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert not any(info.values())
    value = perplexity_in_transformers(model, out, text)
    assert done.perplexities[-1] == pytest.approx(value, rel=1e-4)

    # The baseline in eval.
    words = ["eval", vision, "--text", text, "--json", "--out", tmp_path / "eval"]
    metrics = json.loads(run(*words).stdout)["rows"][0]["metrics"]
    assert metrics["perplexity text.txt"]["mean"] == pytest.approx(done.perplexities[0], rel=1e-4)


def test_a_language_part_that_is_not_supported_is_named(vision, tmp_path) -> None:
    text_config = {"model_type": "qwen2_5_vl_text"}
    edit_config(vision, model_type="qwen2_5_vl", text_config=text_config, vision_config={})
    done = quantize(vision, tmp_path / "out", check=2)
    assert "architecture 'qwen2_5_vl_text' is not supported" in done.stderr
