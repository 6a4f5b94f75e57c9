"""Model directories: what is refused, and what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from effml_common.errors import InputError
from sliderquant.adapters.files import load_config, load_model
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.model_folder import open_model
from sliderquant.adapters.text import calibration_samples, encode, read_documents

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def edit_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(directory) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(directory) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def poison(value):
    def change(tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    return lambda directory: edit_weights(directory, change)


def drop_weight(directory) -> None:
    edit_weights(directory, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def store_codes(dtype):
    """Weights in a type of quantized models, whose scales and config were lost."""

    def change(tensors) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 100).to(dtype)

    return lambda directory: edit_weights(directory, change)


def reshape_weight(directory) -> None:
    def change(tensors) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    edit_weights(directory, change)


def pickle_weights(directory) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def stream(directory) -> None:
    """What ``quantize`` does before it begins."""
    open_model(directory).source.check_finite()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no model directory"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: edit_config(d, model_type="gpt2"), "'gpt2' is not supported"),
        (lambda d: edit_config(d, model_type="nonesuch"), "cannot be read"),
        (
            lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
            "quantized already",
        ),
        (truncate, "damaged"),
        (damage_header, "damaged"),
        (poison(float("nan")), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
        (poison(float("-inf")), "NaN or infinity"),
        (drop_weight, r"lacks 1 weights, such as model\.layers\.2\.mlp\.up_proj"),
        (reshape_weight, r"up_proj\.weight has shape \[\d+, \d+\], its config asks for \["),
        (store_codes(torch.int8), r"up_proj\.weight as I8, a type of quantized models"),
        (store_codes(torch.float8_e4m3fn), "as F8_E4M3, a type of quantized models"),
        (lambda d: edit_config(d, num_hidden_layers=0), "num_hidden_layers is 0"),
        (lambda d: edit_config(d, text_config="odd"), r"cannot be \w+.* \(.*\); restore"),
        (pickle_weights, "no safetensors"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    ],
)
@pytest.mark.parametrize("read", [load_model, stream], ids=["whole", "streamed"])
def test_damaged_directories_are_named_in_one_line(model_copy, damage, message, read) -> None:
    damage(model_copy)
    with pytest.raises(InputError, match=message) as caught:
        read(model_copy)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("read", [load_model, stream], ids=["whole", "streamed"])
def test_weights_that_the_config_has_no_place_for_are_named(model_copy, read, capsys) -> None:
    read(model_copy)
    assert "no place for" not in capsys.readouterr().err

    # Buffers of former versions belong to every model; blocks and adapters do not.
    prefix = "model.layers.0.self_attn."
    edit_weights(
        model_copy, lambda tensors: tensors.update({f"{prefix}rotary_emb.inv_freq": torch.ones(4)})
    )
    read(model_copy)
    assert "no place for" not in capsys.readouterr().err
    edit_config(model_copy, num_hidden_layers=4)
    read(model_copy)
    told = capsys.readouterr().err
    assert "holds 9 weights that its config.json has no place for, such as model.layers.4." in told
    edit_config(model_copy, num_hidden_layers=5)
    edit_weights(
        model_copy,
        lambda tensors: tensors.update({f"{prefix}q_proj.lora_A.weight": torch.ones(4, 4)}),
    )
    read(model_copy)
    assert "holds 1 weights that its config.json" in (told := capsys.readouterr().err)
    assert "q_proj.lora_A.weight" in told


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"needs another library \(.*\); install it"),
        ("odd", "quantization_config is 'odd'; restore it"),
    ],
)
def test_quantizations_that_cannot_be_read_are_one_line(model_copy, quantization, message) -> None:
    edit_config(model_copy, quantization_config=quantization)
    with pytest.raises(InputError, match=message):
        load_any(model_copy)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_runs_only_when_asked(model_copy, trusted) -> None:
    marker = model_copy / "ran"
    code = (
        "from transformers import LlamaConfig\n"
        "open({!r}, 'w').close()\n"
        "class Odd(LlamaConfig):\n"
        "    model_type = 'odd'\n"
    )
    (model_copy / "odd.py").write_text(code.format(str(marker)))
    edit_config(model_copy, model_type="odd", auto_map={"AutoConfig": "odd.Odd"})
    with pytest.raises(InputError) as caught:
        open_model(model_copy, trust_remote_code=trusted)
    assert marker.exists() == trusted
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantized", [False, True])
def test_measuring_runs_no_code_of_a_model_and_asks_nobody(
    model_copy, quantized, monkeypatch
) -> None:
    """transformers asks on a terminal whether to run such code, unless it is told not to."""
    marker = model_copy / "ran"
    (model_copy / "odd.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class Odd(LlamaConfig):\n"
        "    model_type = 'odd'\n"
    )
    edit_config(model_copy, model_type="odd", auto_map={"AutoConfig": "odd.Odd"})
    if quantized:
        edit_config(model_copy, quantization_config={"quant_method": "compressed-tensors"})
    asked = []
    monkeypatch.setattr("builtins.input", lambda words="": asked.append(words) or "y")
    with pytest.raises(InputError) as caught:
        load_any(model_copy)
    assert (asked, marker.exists()) == ([], False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_residual_rotation_is_refused_where_a_norm_follows_the_block(save, name) -> None:
    with pytest.raises(InputError, match=r"rotate r1 does not fit gemma.*use --rotate r2"):
        open_model(save(name), rotate="both")


def test_streamed_blocks_are_those_of_the_loaded_model(family, save) -> None:
    directory = save(family)
    model = AutoModelForCausalLM.from_pretrained(directory)
    opened = open_model(directory)
    for number, block in enumerate(model.model.layers):
        streamed = opened.source.block(number)
        own = dict(block.named_parameters())
        assert streamed.keys() == own.keys()
        assert all(torch.equal(streamed[name], own[name]) for name in own)
    outside = opened.source.outside()
    assert torch.equal(outside["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(outside["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    # Buffers are real, parameters are not.
    assert all(parameter.is_meta for parameter in opened.decoder.model.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(opened.decoder.model.get_buffer(name), buffer)


def test_only_blocks_that_are_held_stay_in_memory(save) -> None:
    decoder = open_model(save("llama")).decoder
    decoder.hold([0, 1])
    held = [decoder.tensors(block) for block in range(3)]
    assert decoder.tensors(0) is held[0]
    assert decoder.tensors(2) is not held[2]
    decoder.hold([1])
    assert decoder.tensors(1) is held[1]
    assert decoder.tensors(0) is not held[0]


def test_missing_directory_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "nowhere")


def test_chat_lines_go_through_the_models_template(loaded, tmp_path) -> None:
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": chat}) + "\n\n" + json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(InputError, match=r"\(line 1\): a chat, and the model has no chat template"):
        read_documents([str(path)], loaded.tokenizer)
    loaded.tokenizer.chat_template = CHAT_TEMPLATE
    documents = read_documents([str(path)], loaded.tokenizer)
    assert documents == ["[user] hi\n[assistant] ho\n", "plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n', "neither 'text' nor 'messages'"),
        ("a.jsonl", b"{]\n", "no JSON"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"  \n", "no text"),
        (None, None, "cannot be read"),
    ],
)
def test_bad_text_files_are_named(loaded, tmp_path, name, content, message) -> None:
    path = tmp_path / (name or "nowhere.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents([str(path)], loaded.tokenizer)


def test_samples_are_crops_of_the_stream_and_follow_the_seed(loaded, corpus, capsys) -> None:
    stream = encode([corpus.code[:5000]], loaded.tokenizer)
    first, again, other = (calibration_samples(stream, 6, 64, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    windows = stream.unfold(0, 64, 1)
    assert all((windows == sample).all(dim=1).any() for sample in first)
    assert "only 384 calibration tokens" in capsys.readouterr().err


def test_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(InputError, match="has 63 tokens, one sample needs 64"):
        calibration_samples(torch.arange(63), 1, 64, 0)
