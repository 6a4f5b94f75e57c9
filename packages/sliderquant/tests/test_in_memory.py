"""A model in memory is quantized to the bits that the command writes for its folder."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sliderquant
from effml_common.errors import ConfigError, InputError
from sliderquant import QuantizeConfig, SliderConfig, quantize, quantize_model
from sliderquant.adapters.files import load_model
from sliderquant.adapters.text import begin_tokens, calibration_samples, read_tokens
from sliderquant.commands import quantize_model as module

SETTINGS = {"nsamples": 8, "seqlen": 24, "group_size": 16, "wbits": 3}
METHODS = {
    "compensated": {},
    "combined": {"method": "combined", "window": 2, "shallow": 1, "deep": 1},
    "slider": {"method": "slider", "epochs": 2, "lr_lora": 3e-3, "batch_size": 2},
}


def samples_of(folder: Path, text: Path) -> tuple[Tensor, object]:
    """Return the samples that the command draws, and the tokenizer."""
    loaded = load_model(folder)
    tokenizer = loaded.tokenizer
    stream = read_tokens([str(text)], tokenizer, loaded.model)
    count, length = SETTINGS["nsamples"], SETTINGS["seqlen"]
    return calibration_samples(stream, count, length, 2, begin_tokens(tokenizer)), tokenizer


def tensors_in(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_same_files(found: Path, wanted: Path) -> None:
    ours, theirs = tensors_in(found), tensors_in(wanted)
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.fixture
def both(save, tmp_path, monkeypatch):
    """Quantizes a tiny model by the command and in memory; returns (result, folder of the command)."""

    def run(family: str, *, dtype: torch.dtype = torch.float32, stored="dense", **settings):
        changes = settings.pop("changes", {})
        folder = save(family, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if dtype != torch.float32:
            model.save_pretrained(folder)
        settings = SETTINGS | settings
        config = QuantizeConfig(
            model=str(folder), calib=(str(tmp_path / "text.txt"),), out=str(tmp_path / "command"),
            format=stored, device="cpu", **settings,
        )  # fmt: skip
        quantize(config)
        samples, tokenizer = samples_of(folder, tmp_path / "text.txt")
        # Nothing is written while it works.
        with monkeypatch.context() as patch:
            patch.chdir("/")
            result = quantize_model(model, samples, SliderConfig(**settings))
        result.save(tmp_path / "memory", tokenizer=tokenizer, format=stored)
        return result, tmp_path / "command"

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_saved_model_is_that_of_the_command(name, method, both, tmp_path) -> None:
    result, folder = both(name, stored="compressed-tensors", **METHODS[method])
    assert_same_files(tmp_path / "memory", folder)
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "memory", folder)]
    assert configs[0] == configs[1]
    assert result.config.nsamples == 8


@pytest.mark.parametrize("method", ["compensated", "slider"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_bfloat16_model_with_tied_embeddings_too(name, method, both, tmp_path) -> None:
    tied = {"tie_word_embeddings": True}
    result, folder = both(name, dtype=torch.bfloat16, changes=tied, **METHODS[method])
    assert_same_files(tmp_path / "memory", folder)

    # The model in memory holds what the folder holds, in the type it had.
    parameters = dict(result.model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    written = tensors_in(folder)
    assert parameters.keys() == written.keys()
    assert [name for name in written if not torch.equal(parameters[name], written[name])] == []


def test_experts_are_trained_and_saved_too(both, tmp_path) -> None:
    settings = METHODS["slider"] | {"min_expert_tokens": 1}
    _, folder = both("qwen3_moe", stored="compressed-tensors", **settings)
    assert_same_files(tmp_path / "memory", folder)


def test_the_model_computes_what_the_saved_folder_computes(both, tokens, tmp_path) -> None:
    result, _ = both("llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    with torch.no_grad():
        assert torch.equal(result.model(tokens).logits, loaded(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "memory")
    assert tokenizer("ab")["input_ids"] == [65, 66]
    card = (tmp_path / "memory/README.md").read_text()
    assert "8 samples of 24 token ids" in card
    assert "wbits 3" in card


def test_activations_are_rounded_in_memory_as_in_the_folder(both, tokens, tmp_path) -> None:
    settings = {"abits": 4, "act_sym": False, "quantize_attention": True}
    result, folder = both("llama", stored="native", **settings)
    assert_same_files(tmp_path / "memory", folder)

    # The native folder rounds them when it is loaded; without rounding the logits are others.
    loaded = sliderquant.load(tmp_path / "memory")
    with torch.no_grad():
        rounded = result.model(tokens).logits
        assert torch.equal(rounded, loaded(tokens).logits)
        result.rounding.remove()
        assert not torch.allclose(rounded, result.model(tokens).logits, atol=1e-3)
    with pytest.raises(ConfigError, match="has no rounding of queries"):
        result.save(tmp_path / "other")


def test_samples_may_come_one_by_one_and_the_format_later(tiny, tokens, tmp_path) -> None:
    config = SliderConfig(wbits=2, group_size=16, sym=False)
    together = quantize_model(tiny("llama"), tokens, config)
    apart = quantize_model(tiny("llama"), list(tokens.int()), config)
    for ours, theirs in zip(together.model.parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    # One result, three formats, and no tokenizer.
    folders = [
        together.save(tmp_path / "ct", container_bits=4),
        together.save(tmp_path / "native", format="native"),
        together.save(tmp_path / "dense", format="dense"),
    ]
    assert not list(tmp_path.glob("*/tokenizer*"))
    models = [AutoModelForCausalLM.from_pretrained(folders[0]), sliderquant.load(folders[1])]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folders[2])(tokens).logits
        assert all(torch.equal(model(tokens).logits, wanted) for model in models)
    with pytest.raises(InputError, match="holds a model already"):
        together.save(tmp_path / "dense", format="dense")
    with pytest.raises(ConfigError, match="format is pre-quant; use"):
        together.save(tmp_path / "new", format="pre-quant")
    with pytest.raises(ConfigError, match="sliderquant export"):
        together.save(tmp_path / "new", format="gguf")
    with pytest.raises(ConfigError, match="container_bits is 5; give 4"):
        together.save(tmp_path / "new", container_bits=5)


def test_a_model_stays_as_it_was_if_something_fails(tiny, tokens, monkeypatch) -> None:
    model = tiny("llama").train()
    before = copy.deepcopy(model.state_dict())

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "calibrate", fail)
        with pytest.raises(RuntimeError):
            quantize_model(model, tokens, SliderConfig(group_size=16))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    # Its mode, and what is trained of it, are the caller's.
    quantize_model(model, tokens, SliderConfig(group_size=16))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InputError, match="quantized already; load the full-precision model"):
        quantize_model(model, tokens, SliderConfig(group_size=16))


def test_estimate_progress_and_warnings_are_those_of_the_command(tiny, tokens, capsys) -> None:
    quantize_model(tiny("llama"), tokens, SliderConfig(group_size=16, epochs=2, method="slider"))
    said = capsys.readouterr().err
    assert "only 48 calibration tokens; 16384 or more are better" in said
    assert "windows x 2 stages" in said
    assert "GiB disk" not in said
    assert "loss" in said


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 4), "tokens are torch.float32; give token ids as int64"),
        (torch.zeros(8, dtype=torch.int64), r"shape \[8\]; give samples in rows"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \[0, 4\]; give samples in rows"),
        (torch.full((2, 4), 96), "hold 96, the model knows 0 to 95; use the tokenizer"),
        (torch.full((2, 4), -100), "hold -100, the model knows 0 to 95"),
        (torch.zeros(2, 65, dtype=torch.int64), "have 65 tokens, the model reads 64 at most"),
        ([], "an empty list; give one sample or more"),
        ([[1, 2]], "sample 0 of tokens is no tensor of one axis"),
        ([torch.zeros(3), torch.zeros(4)], "sample 1 of tokens has 4 ids and sample 0 has 3"),
    ],
)
def test_tokens_that_do_not_fit_are_named(tokens, message, tiny) -> None:
    with pytest.raises(InputError, match=message):
        quantize_model(tiny("llama"), tokens, SliderConfig(group_size=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotate": "r2"}, "use sliderquant quantize on its folder"),
        ({"nsamples": 3}, "nsamples is 3 and tokens have 4; leave it out"),
        ({"seqlen": 7}, "seqlen is 7 and tokens have 12; leave it out"),
        ({"group_size": 128}, "group_size 128 does not divide"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message, tiny, tokens) -> None:
    with pytest.raises(InputError, match=message):
        quantize_model(tiny("llama"), tokens, SliderConfig(**{"group_size": 16} | settings))


def test_a_model_with_adapters_is_named(tiny, tokens) -> None:
    class Adapted(torch.nn.Linear):
        """A layer with a low-rank path beside it, as adapter libraries put it into a model."""

        def __init__(self) -> None:
            super().__init__(32, 48)
            self.lora_a = torch.nn.Linear(32, 2)

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = Adapted()
    with pytest.raises(InputError, match=r"\(.*lora_a.*\); merge adapters and unwrap it first"):
        quantize_model(model, tokens, SliderConfig(group_size=16))


def test_models_that_do_not_fit_are_named(tiny, tokens) -> None:
    config = SliderConfig(group_size=16)
    with pytest.raises(InputError, match="model is a Linear, not a transformers model"):
        quantize_model(torch.nn.Linear(2, 2), tokens, config)

    broken = tiny("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize_model(broken, tokens, config)

    integers = tiny("llama")
    name = "model.layers.0.mlp.up_proj"
    integers.get_submodule(name).weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"up_proj\.weight is torch\.int8; give a full-precision"):
        quantize_model(integers, tokens, config)

    with pytest.raises(InputError, match="is on meta"):
        quantize_model(tiny("llama").to("meta"), tokens, config)


def test_a_model_whose_first_block_was_left_out_is_quantized_already(tiny, tokens) -> None:
    model = tiny("llama")
    quantize_model(model, tokens, SliderConfig(group_size=16, ignore=("layers.0.*",)))
    with pytest.raises(InputError, match="quantized already"):
        quantize_model(model, tokens, SliderConfig(group_size=16))


def test_experts_that_were_left_out_are_refused_where_nobody_loads_them(
    tiny, tokens, tmp_path
) -> None:
    result = quantize_model(
        tiny("mixtral"), tokens, SliderConfig(group_size=16, ignore=("*experts*",))
    )
    with pytest.raises(ConfigError, match="takes all experts"):
        result.save(tmp_path / "packed")


def test_what_is_no_tokens_and_no_settings_is_named(tiny, tokens) -> None:
    with pytest.raises(InputError, match="tokens are a NoneType"):
        quantize_model(tiny("llama"), None, SliderConfig(group_size=16))
    with pytest.raises(InputError, match="config is a dict"):
        quantize_model(tiny("llama"), tokens, {"group_size": 16})


def test_models_with_different_grids_may_be_used_at_once_and_in_threads(tiny, tokens) -> None:
    def rounded(family: str, abits: int):
        config = SliderConfig(
            group_size=16, abits=abits, quantize_attention=True, channel_scale="off"
        )
        return quantize_model(tiny(family), tokens, config)

    @torch.no_grad()
    def logits(result) -> Tensor:
        return result.model(tokens).logits

    for family in ("llama", "mixtral"):
        first = rounded(family, 4)
        alone = logits(first)
        second = rounded(family, 8)
        torch.testing.assert_close(logits(first), alone, rtol=0, atol=0)

        # As generation does that is streamed.
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(pool.submit(logits, first).result(), alone, rtol=0, atol=0)

        # In whatever order they are taken out.
        first.rounding.remove()
        assert not torch.equal(logits(first), alone)
        second.rounding.remove()
