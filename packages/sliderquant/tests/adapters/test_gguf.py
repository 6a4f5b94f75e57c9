"""GGUF files: read back with llama.cpp's own library, compared with what was quantized."""

import json
import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import AutoConfig

from effml_common.cli import main
from effml_common.errors import InputError
from sliderquant.adapters.gguf import GGUF_FAMILIES, Parameter, check_gguf, write_gguf
from sliderquant.adapters.gguf_blocks import gguf_kind, gguf_weight
from sliderquant.adapters.gguf_tokenizer import SPLITTING_RULES, add_tokenizer
from sliderquant.adapters.layer_bits import block_formats, layer_bits
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.quantizer import WeightFormat, quantize_weight, simulate_scale

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 384, "num_hidden_layers": 6}
NATIVE = ["--format", "native"]
PERIOD = [*["sliding_attention"] * 5, "full_attention"]
FAMILY_CHANGES = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"layer_types": PERIOD, "query_pre_attn_scalar": 8},
}


def run(*words: object, code: int = 0) -> None:
    assert main("sliderquant", "sliderquant", COMMANDS, [*map(str, words)]) == code


def float16_format(bits: int, group_size: int, sym: bool) -> WeightFormat:
    digits = 11 if sym else 7
    return WeightFormat(
        bits=bits, group_size=group_size, sym=sym, dtype=torch.float32, float16_digits=digits
    )


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "kind"),
    [
        (4, 32, True, "Q4_0"),
        (4, 32, False, "Q4_1"),
        (8, 32, True, "Q8_0"),
        (4, 96, True, "Q4_0"),
        (2, 64, False, "Q4_1"),
        (3, 192, True, "Q4_0"),
        (6, 32, True, "Q8_0"),
    ],
)
def test_blocks_hold_every_weight_exactly(bits, group_size, sym, kind, size) -> None:
    fmt = float16_format(bits, group_size, sym)
    generator = torch.Generator().manual_seed(bits)
    weight = quantize_weight(size * torch.randn(5, 192, generator=generator), fmt)
    stored = gguf_weight(weight)
    assert stored.kind == kind
    read = dequantize(stored.blocks.numpy(), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read, weight.dequantize().numpy())
    torch.testing.assert_close(stored.values, weight.dequantize(), rtol=0, atol=0)


def test_a_rounded_scale_times_any_zero_point_is_a_float16_number() -> None:
    fmt = float16_format(4, 32, sym=False)
    scales = torch.logspace(-5, 3, 2000)
    rounded = simulate_scale(scales, fmt)
    products = rounded.unsqueeze(1) * torch.arange(16)
    assert torch.equal(products.to(torch.float16).float(), products)
    assert ((rounded - scales).abs() <= scales / 128 + 2**-24).all()


def test_scales_of_another_type_are_rounded_and_the_values_say_so() -> None:
    fmt = WeightFormat(bits=4, group_size=32, sym=False, dtype=torch.float32)
    weight = quantize_weight(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), fmt)
    stored = gguf_weight(weight)
    read = dequantize(stored.blocks.numpy(), GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(read, stored.values.numpy())
    error = (stored.values - weight.dequantize()).abs() / weight.scale.amax()
    assert 0 < error.max() < 0.02


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (WeightFormat(bits=4, group_size=16, sym=True, dtype=torch.float32), "groups of 16"),
        (WeightFormat(bits=8, group_size=32, sym=False, dtype=torch.float32), "of 8 bits"),
    ],
)
def test_codes_without_a_place_are_refused(fmt, message) -> None:
    with pytest.raises(InputError, match=message):
        gguf_kind(fmt, 64)


def test_a_scale_beyond_float16_is_refused() -> None:
    fmt = WeightFormat(bits=8, group_size=32, sym=False, dtype=torch.float32)
    weight = quantize_weight(torch.full((1, 32), 1e6), fmt)
    with pytest.raises(InputError, match="asymmetric"):
        gguf_weight(weight)
    symmetric = WeightFormat(bits=4, group_size=32, sym=True, dtype=torch.float32)
    weight = quantize_weight(torch.full((1, 32), 1e4), symmetric)
    weight.scale.fill_(1e5)
    with pytest.raises(InputError, match="beyond float16"):
        gguf_weight(weight)


@pytest.mark.parametrize("architecture", FAMILY_CHANGES)
def test_a_file_has_every_parameter_as_llama_cpp_wants_it(
    architecture, tiny, model_directory, tmp_path
) -> None:
    # A quantized model in memory; norms and embeddings stay as they are.
    biases = {"attention_bias": False, "mlp_bias": False} if architecture == "llama" else {}
    model = tiny(architecture, **SIZES, **biases, **FAMILY_CHANGES[architecture])
    fmt = float16_format(4, 32, sym=True)
    weights = {}
    parameters = {}
    for name, parameter in model.named_parameters():
        is_linear = "_proj" in name
        value = quantize_weight(parameter.detach(), fmt) if is_linear else parameter.detach()
        weights[name] = value.dequantize() if is_linear else value
        parameters[name] = Parameter(
            shape=tuple(parameter.shape),
            fmt=fmt if is_linear else None,
            dtype=torch.float32,
            read=lambda value=value: value,
        )
    path = tmp_path / "model.gguf"
    config = check_gguf(model.config.to_dict())
    written = list(write_gguf(path, config, model_directory, parameters, lambda: None))
    assert len(written) == 7 * 6
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]

    # What the file holds, by its own names.
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    assert len(tensors) == len(parameters)
    np.testing.assert_array_equal(
        tensors["token_embd.weight"], weights["model.embed_tokens.weight"]
    )

    # Llama's queries and keys pair neighbours; Gemma's norms hold 1 + weight.
    for block in range(6):
        prefix = f"model.layers.{block}."
        query = weights[prefix + "self_attn.q_proj.weight"].numpy()
        if architecture == "llama":
            query = query.reshape(4, 2, -1, 64).swapaxes(1, 2).reshape(query.shape)
        np.testing.assert_array_equal(tensors[f"blk.{block}.attn_q.weight"], query)
        value = weights[prefix + "self_attn.v_proj.weight"]
        np.testing.assert_array_equal(tensors[f"blk.{block}.attn_v.weight"], value)
        gain = weights[prefix + "input_layernorm.weight"] + (
            1.0 if architecture == "gemma3" else 0.0
        )
        np.testing.assert_allclose(tensors[f"blk.{block}.attn_norm.weight"], gain, rtol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma3", {"layer_types": PERIOD[::-1]}, "not every 6th of its blocks"),
        ("gemma3", {**FAMILY_CHANGES["gemma3"], "query_pre_attn_scalar": 16}, "scalar is 16"),
        ("gemma3", {**FAMILY_CHANGES["gemma3"], "attn_logit_softcapping": 5.0}, "is 5.0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"hidden_act": "gelu"}, "its MLP has gelu"),
        ("gemma3", {**FAMILY_CHANGES["gemma3"], "hidden_activation": "gelu"}, "its MLP has gelu"),
        ("phi3", {}, "'phi3'"),
        ("qwen3_moe", {}, "'qwen3_moe'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(architecture, changes, message, tiny) -> None:
    config = tiny(architecture, **SIZES, **changes).config.to_dict()
    with pytest.raises(InputError, match=re.escape(message)):
        check_gguf(config)


def test_llama_3_divides_its_rotary_frequencies(tiny, model_directory, tmp_path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = tiny("llama", **SIZES, rope_parameters=rope, head_dim=16)
    parameter = Parameter(
        shape=(384, 64), fmt=None, dtype=torch.float32, read=lambda: torch.zeros(384, 64)
    )
    config = check_gguf(model.config.to_dict())
    path = tmp_path / "model.gguf"
    names = {"model.embed_tokens.weight": parameter}
    list(write_gguf(path, config, model_directory, names, lambda: None))
    (factors,) = (t.data for t in GGUFReader(path).tensors if t.name == "rope_freqs.weight")

    # Low frequencies are divided by 8, high ones stay.
    plain = 5e5 ** (-np.arange(0, 16, 2) / 16)
    wavelength = 2 * np.pi / plain
    assert factors[wavelength < 32 / 4] == pytest.approx(1.0)
    assert factors[wavelength > 32 / 1] == pytest.approx(8.0)


class Recorder:
    """Stands in for the library's writer: keeps what is called."""

    def __init__(self) -> None:
        self.calls: dict[str, object] = {}

    def __getattr__(self, name: str):
        return lambda value: self.calls.__setitem__(name, value)


def tokenizer_folder(folder, **parts):
    tokenizer = {
        "model": {
            "type": "BPE", "vocab": {"<0x0A>": 0, "a": 1, "b": 2, "ab": 3, "▁ab": 4, "▁": 5},
            "merges": [["a", "b"], ["▁", "ab"]], "byte_fallback": True, "unk_token": None,
        },
        "added_tokens": [{"id": 6, "content": "<s>", "special": True},
                         {"id": 7, "content": "<tag>", "special": False}],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    } | parts  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


def test_a_tokenizer_of_characters_is_written_with_scores(tmp_path) -> None:
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    }
    writer = Recorder()
    folder = tokenizer_folder(tmp_path, normalizer=prepend, post_processor=template)
    add_tokenizer(writer, folder, 9)
    assert writer.calls["add_tokenizer_model"] == "llama"
    assert writer.calls["add_token_list"][-2:] == ["<tag>", "[PAD8]"]
    assert writer.calls["add_token_types"] == [6, 1, 1, 1, 1, 1, 3, 4, 5]
    scores = writer.calls["add_token_scores"]
    assert scores[3] > scores[4] > scores[1]  # "ab" is merged before "▁ab"; "a" by no merge
    assert writer.calls["add_add_space_prefix"] is True
    assert writer.calls["add_add_bos_token"] is True
    assert writer.calls["add_bos_token_id"] == 6


@pytest.mark.parametrize(("rule", "name"), SPLITTING_RULES.items())
def test_byte_level_tokenizers_are_known_by_their_rule(rule, name, tmp_path) -> None:
    splitter = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ],
    }
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    writer = Recorder()
    add_tokenizer(writer, tokenizer_folder(tmp_path, model=model, pre_tokenizer=splitter), 8)
    assert writer.calls["add_tokenizer_pre"] == name
    assert writer.calls["add_token_merges"] == ["a b"]
    assert writer.calls["add_add_bos_token"] is False

    splitter["pretokenizers"][0]["pattern"]["Regex"] = rule + r"|\p{Han}"
    folder = tokenizer_folder(tmp_path, model=model, pre_tokenizer=splitter)
    with pytest.raises(InputError, match="no rule of Llama 3"):
        add_tokenizer(writer, folder, 8)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}}, "Replace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
         "add_prefix_space"),
    ],
)  # fmt: skip
def test_changes_of_a_text_that_llama_cpp_does_not_make_are_refused(part, named, tmp_path) -> None:
    with pytest.raises(InputError, match=f"changes text by {named}"):
        add_tokenizer(Recorder(), tokenizer_folder(tmp_path, **part), 8)


def test_another_kind_of_tokenizer_is_refused(tmp_path) -> None:
    folder = tokenizer_folder(tmp_path, model={"type": "WordLevel", "vocab": {}})
    with pytest.raises(InputError, match="WordLevel"):
        add_tokenizer(Recorder(), folder, 8)


@pytest.mark.parametrize("sym", [True, False])
def test_a_model_quantized_for_gguf_keeps_every_weight(
    sym, model_directory, text_file, tmp_path, capsys
) -> None:
    native, out = tmp_path / "native", tmp_path / "gguf"
    run(
        "quantize", model_directory, "--calib", text_file, "--for", "gguf", "--format", "native",
        "--nsamples", 8, "--seqlen", 64, "--out", native, "--sym" if sym else "--no-sym",
    )  # fmt: skip
    assert json.loads((native / "config.json").read_text())["quantization_config"]["weights"][
        "model.layers.0.mlp.up_proj.weight"
    ] == {"bits": 4, "group_size": 32, "sym": sym, "float16_digits": 11 if sym else 7}
    capsys.readouterr()
    run("export", native, "--format", "gguf", "--out", out, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["cost"] == {"changed": 0.0, "largest": 0.0, "perplexity": {}}
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.gguf", "run"]
    assert "every weight keeps its value" in (out / "README.md").read_text()
    assert "llama-server" in (out / "README.md").read_text()

    # A second export there changes nothing; one of another model is refused.
    before = (out / "model.gguf").stat().st_mtime_ns
    run("export", native, "--format", "gguf", "--out", out)
    assert (out / "model.gguf").stat().st_mtime_ns == before
    (native / "config.json").write_text((native / "config.json").read_text() + " ")
    run("export", native, "--format", "gguf", "--out", out, code=2)


@pytest.mark.parametrize("method", ["compensated", "combined"])
def test_layers_with_bits_of_their_own_keep_every_weight(
    method, model_directory, text_file, tmp_path, capsys
) -> None:
    native, out = tmp_path / "native", tmp_path / "gguf"
    run(
        "quantize", model_directory, "--calib", text_file, "--for", "gguf", "--format", "native",
        "--bits-for", "layers.0.*=8", "--ignore", "layers.1.mlp.*", "--method", method,
        "--nsamples", 8, "--seqlen", 64, "--out", native,
    )  # fmt: skip
    weights = json.loads((native / "config.json").read_text())["quantization_config"]["weights"]
    for name, entry in weights.items():
        bits = 8 if name.startswith("model.layers.0.") else 4
        expected = {"bits": bits, "group_size": 32, "sym": True, "float16_digits": 11}
        assert entry == expected, name
    capsys.readouterr()
    run("export", native, "--format", "gguf", "--out", out, "--json")
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost == {"changed": 0.0, "largest": 0.0, "perplexity": {}}

    # A place of its own for every format, and what is left out as it is.
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(out / "model.gguf").tensors}
    for name, kind in kinds.items():
        if name.startswith("blk.") and "norm" not in name:
            kept = name.startswith("blk.1.ffn")
            quantized = "Q8_0" if name.startswith("blk.0.") else "Q4_0"
            assert kind == ("F32" if kept else quantized), name


def test_digits_of_a_scale_are_those_of_the_layers_own_bits() -> None:
    config = SliderConfig(for_="gguf", wbits=16, sym=False, bits_for=("down_proj=4",))
    (bits,) = layer_bits(config, [("mlp.down_proj.weight", "mlp.up_proj.weight")])
    formats = block_formats(config, bits, torch.bfloat16)
    assert formats["mlp.down_proj.weight"] == float16_format(4, 32, sym=False)
    assert formats["mlp.up_proj.weight"].float16_digits is None
    assert formats["mlp.up_proj.weight"].bits == 16


def test_another_model_says_what_float16_costs(
    model_directory, text_file, held_out_file, tmp_path, capsys
) -> None:
    native, out = tmp_path / "native", tmp_path / "gguf"
    run(
        "quantize", model_directory, "--calib", text_file, "--format", "native", "--nsamples", 8,
        "--seqlen", 64, "--group-size", 64, "--no-sym", "--out", native,
    )  # fmt: skip
    capsys.readouterr()
    run("export", native, "--format", "gguf", "--text", held_out_file, "--out", out, "--json")
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["changed"] > 0.5
    assert 0 < cost["largest"] < 0.02
    ((before, after),) = cost["perplexity"].values()
    assert after == pytest.approx(before, rel=1e-2)
    assert after != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wbits", 3], "wbits is 3; give 4"),
        (["--group-size", 48], "group_size is 48; give 32"),
        (["--group-size", "none"], "group_size is None; give 32"),
        (["--abits", 8], "abits is 8; leave it at 16"),
        (["--wbits", 8, "--no-sym"], "wbits is 8; give 4, or 8 with --sym"),
        (["--format", "dense"], "add --format native"),
        (["--bits-for", "q_proj=5"], "bits_for has 'q_proj=5', and --for is gguf; give 4, 8 with"),
        (["--no-sym", "--bits-for", "q_proj=8"], "bits_for has 'q_proj=8', and --for is gguf"),
        (
            [*NATIVE, "--sensitivity", "s", "--sensitive-bits", 6],
            "sensitive_bits is 6; give 4, 8 with",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_work(words, message, tmp_path, capsys) -> None:
    run("quantize", "m", "--calib", "t", "--for", "gguf", *words, "--out", tmp_path / "o", code=2)
    assert message in capsys.readouterr().err


def test_every_family_of_the_table_is_supported_elsewhere() -> None:
    for name in GGUF_FAMILIES:
        assert AutoConfig.for_model(name).model_type == name
