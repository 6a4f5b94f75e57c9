"""Exported directories, loaded by transformers alone or by this package, against the simulated model."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import sliderquant
from effml_common.errors import ConfigError, InputError
from sliderquant.adapters.families import block_layout
from sliderquant.adapters.files import load_config
from sliderquant.adapters.formats import check_expressible, layer_patterns
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.commands.export import export
from sliderquant.config import ExportConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.quantizer import WeightFormat, quantize_weight

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    family: str
    bits: int
    group: int | None
    sym: bool
    format: str = "compressed-tensors"
    activations: ActivationFormat | None = None
    mixed: bool = False
    container: int | None = None
    tied: bool = False


ACT8 = ActivationFormat(bits=8, sym=True)
LOADED_BY_TRANSFORMERS = {
    "w4a16": Case("llama", 4, 16, True),
    "w8a16": Case("llama", 8, None, True),
    "w3 per row": Case("qwen3", 3, None, True),
    "w2": Case("phi3", 2, 16, True, tied=True),
    "w4 asymmetric": Case("llama", 4, 16, False),
    "w2 asymmetric per row": Case("qwen2", 2, None, False),
    "w2 asymmetric in 4 bits": Case("llama", 2, 16, False, container=4),
    "w4a4": Case("llama", 4, None, True, activations=ActivationFormat(bits=4, sym=True)),
    "w8a8": Case("gemma2", 8, None, True, activations=ACT8),
    "mixed bits": Case("llama", 2, 16, True, mixed=True),
    "experts": Case("qwen3_moe", 3, 16, True),
    "other experts": Case("mixtral", 4, 16, True),
    "dense": Case("llama", 2, 16, False, format="dense"),
    "dense experts": Case("mixtral", 2, 16, False, format="dense"),
}
NATIVE = {
    "w2": Case("llama", 2, 16, False),
    "w3 per row": Case("gemma3", 3, None, True),
    "w8 tied": Case("phi4", 8, 16, False, tied=True),
    "experts": Case("qwen3_moe", 2, 16, False),
    "mixed bits": Case("llama", 2, 16, False, mixed=True),
    "w4a4 with attention": Case(
        "llama", 4, None, False, activations=ActivationFormat(bits=4, sym=False, attention=True)
    ),
}


def dtype_of(case: Case) -> torch.dtype:
    """What a case is stored and computed in.

    compressed-tensors rounds activations in their own type, we in float32.
    """
    return BF16 if case.activations is None or case.format == "native" else torch.float32


def formats_of(model: PreTrainedModel, case: Case) -> dict[str, WeightFormat]:
    """Of every linear; mixed: the first block in 4 bits, one layer of the second left as it is."""
    dtype = dtype_of(case)
    fmt = WeightFormat(bits=case.bits, group_size=case.group, sym=case.sym, dtype=dtype)
    more = WeightFormat(bits=4, group_size=None, sym=case.sym, dtype=dtype)
    formats = {}
    for block, module in enumerate(model.model.layers):
        shapes = {name: p.shape for name, p in module.named_parameters()}
        for name in block_layout(model.config, shapes).linears:
            formats[f"model.layers.{block}.{name}"] = more if case.mixed and block == 0 else fmt
    if case.mixed:
        del formats["model.layers.1.mlp.down_proj.weight"]
    return formats


def write(model: PreTrainedModel, source: Path, out: Path, case: Case, **kwargs) -> PreTrainedModel:
    """Write a model rounded to nearest, block by block; returns the simulated one."""
    formats = formats_of(model, case)
    writer = ModelWriter(
        out, source, format=case.format, dtype=dtype_of(case), activations=case.activations,
        container_bits=case.container, **kwargs,
    )  # fmt: skip
    parts: dict[str, dict] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            value = parameter.clone()
            if name in formats:
                value = quantize_weight(parameter.float(), formats[name])
                parameter.copy_(value.dequantize())
            parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = value
    for part in parts.values():
        writer.write(part)
    writer.publish()
    return model


def logits_of(model: PreTrainedModel, tokens: torch.Tensor, case: Case) -> torch.Tensor:
    with torch.no_grad():
        if case.activations is None:
            return model(tokens, use_cache=False).logits
        with ActivationRounding(model.model.layers, model.config, case.activations):
            return model(tokens, use_cache=False).logits


@pytest.fixture
def make(tiny, tmp_path, tokens):
    """Writes a case; returns its directory and the logits of the simulated model."""

    def made(name: str, case: Case, **kwargs) -> tuple[Path, torch.Tensor]:
        source = tmp_path / f"source {name}"
        initial = tiny(case.family, tie_word_embeddings=case.tied)
        initial.to(dtype_of(case)).save_pretrained(source)
        # Both are loaded from files: in a model that was cast, the rotary tables are, too.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype_of(case))
        check_expressible(case.format, formats_of(model, case), case.activations)
        simulated = write(model, source, tmp_path / name, case, **kwargs)
        return tmp_path / name, logits_of(simulated, tokens, case)

    return made


LOADER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
sys.modules["sliderquant"] = None  # not importable
root, dtypes = sys.argv[1], json.loads(sys.argv[2])
tokens = load_file(root + "/tokens")["tokens"]
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
for name, dtype in dtypes.items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        f"{root}/{name}", output_loading_info=True, dtype=getattr(torch, dtype))
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        save_file({"logits": model(tokens, use_cache=False).logits}, f"{root}/{name}/logits")
"""


@pytest.mark.slow
def test_transformers_alone_computes_what_was_simulated(make, tmp_path, tokens) -> None:
    want = {name: make(name, case)[1] for name, case in LOADED_BY_TRANSFORMERS.items()}
    dtypes = {
        name: str(dtype_of(case)).removeprefix("torch.")
        for name, case in LOADED_BY_TRANSFORMERS.items()
    }
    save_file({"tokens": tokens}, tmp_path / "tokens")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, tmp_path, json.dumps(dtypes)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, logits in want.items():
        got = load_file(tmp_path / name / "logits")["logits"]
        assert torch.equal(got, logits), f"{name}: {(got - logits).abs().max()}"


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_model_computes_what_was_simulated_and_generates(name, make, tokens) -> None:
    directory, want = make(name, Case(**{**NATIVE[name].__dict__, "format": "native"}))
    model = sliderquant.load(directory)
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, want)
        assert torch.equal(model(tokens, use_cache=False).logits, want)
    ids = model.generate(tokens[:1], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert ids.shape == (1, tokens.shape[1] + 3)
    # Greedy: each new token is the argmax of a plain forward pass, without a cache.
    with torch.no_grad():
        last = model(ids[:, :-1], use_cache=False).logits[0, -1].argmax()
    assert last == ids[0, -1]
    with pytest.raises(InputError, match="is not saved again"):
        model.save_pretrained(directory)


def test_a_native_model_stays_packed_in_memory(make) -> None:
    directory, _ = make("w2", Case("llama", 2, 16, True, format="native"))
    model = sliderquant.load(directory)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    on_disk = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert held == pytest.approx(on_disk, rel=0.3)  # headers of the tiny file, rotary tables
    assert model.model.layers[0].self_attn.q_proj.weight_packed.dtype == torch.int32


def test_transformers_refuses_a_native_model_loudly(make) -> None:
    directory, _ = make("w2", Case("llama", 2, 16, True, format="native"))
    with pytest.raises(ValueError, match="sliderquant-native"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="sliderquant-native"):
        AutoConfig.from_pretrained(directory)
    # Not even someone who insists gets a model with random weights.
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(directory)


def test_native_to_compressed_tensors_and_dense_loses_nothing(make, tokens) -> None:
    for name, case in (
        ("dense model", Case("llama", 3, 16, False, format="native")),
        ("experts", Case("mixtral", 4, 16, True, format="native", mixed=False)),
        ("tied", Case("phi4", 4, 16, True, format="native", tied=True)),
    ):
        directory, want = make(name, case)
        (directory / "generation_config.json").write_text('{"max_length": 7}')
        for kind in ("compressed-tensors", "dense", "native"):
            out = directory.with_name(f"{name} {kind}")
            result = export(ExportConfig(model=str(directory), format=kind, out=str(out)))
            model = (
                sliderquant.load(out)
                if kind == "native"
                else AutoModelForCausalLM.from_pretrained(out)
            )
            with torch.no_grad():
                assert torch.equal(model(tokens, use_cache=False).logits, want), (name, kind)
            assert {*result.files, "run"} == {path.name for path in out.iterdir()}
            card = (out / "README.md").read_text()
            assert str(directory.parent) not in card


def test_no_quantized_model_is_quantized_again(make) -> None:
    for kind in ("dense", "native", "compressed-tensors"):
        directory, _ = make(kind, Case("llama", 4, 16, True, format=kind))
        with pytest.raises(InputError, match="quantized already"):
            load_config(directory)


def test_weights_that_are_not_rounded_may_be_quantized_later(tiny, tmp_path) -> None:
    model = tiny("llama").to(BF16)
    model.save_pretrained(tmp_path / "source")
    writer = ModelWriter(tmp_path / "out", tmp_path / "source", format="pre-quant", dtype=BF16)
    changed = {name: p.detach() * 2 for name, p in model.named_parameters()}
    writer.write(changed)
    writer.publish()
    load_config(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, changed[name]), name


def test_an_interrupted_export_repeats_itself_and_ends_the_same(make, tmp_path, tiny) -> None:
    case = Case("llama", 4, 16, True)
    whole, _ = make("whole", case)
    source = tmp_path / "source whole"

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    for failing in ("join", "finish"):
        out = tmp_path / failing
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype_of(case))
        patch = pytest.MonkeyPatch()
        patch.setattr(f"sliderquant.adapters.shards.ShardWriter.{failing}", stop)
        with pytest.raises(Stop):
            write(model, source, out, case, shard_bytes=20_000)
        patch.undo()
        assert (out / "config.json").exists() == (failing == "finish")
        (out / "config.json").unlink(missing_ok=True)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype_of(case))
        write(model, source, out, case, shard_bytes=20_000)
        found = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}
        expected = load_file(whole / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (out / "model.safetensors.index.json").exists()
        assert AutoModelForCausalLM.from_pretrained(out) is not None


def test_a_forgotten_parameter_is_not_published(tiny, tmp_path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    writer = ModelWriter(tmp_path / "out", tmp_path / "source", format="dense", dtype=torch.float32)
    writer.write({n: p for n, p in model.named_parameters() if "layers.1.mlp.up" not in n})
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj"):
        writer.publish()
    assert not (tmp_path / "out" / "config.json").exists()


def wformat(bits=4, group=16, sym=True) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group, sym=sym, dtype=BF16)


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        ({"model.layers.0.mlp.experts.down_proj": wformat(sym=False)}, None, "asymmetric experts"),
        (
            {"model.layers.0.a.weight": wformat(sym=False), "model.layers.1.a.weight": wformat(2)},
            None,
            "of several kinds",
        ),
        (
            {
                "model.layers.0.mlp.experts.down_proj": wformat(2),
                "model.layers.1.mlp.experts.down_proj": wformat(4),
            },
            None,
            "all experts in one format",
        ),
        ({"model.layers.0.mlp.experts.down_proj": wformat()}, ACT8, "activations of experts"),
        ({"model.layers.0.a.weight": wformat(sym=False)}, ACT8, "drops the rounding"),
        ({"model.layers.0.a.weight": wformat()}, ActivationFormat(bits=4, sym=False), "act-sym"),
        (
            {"model.layers.0.a.weight": wformat()},
            ActivationFormat(bits=4, sym=True, attention=True),
            "queries, keys and values",
        ),
    ],
)
def test_what_transformers_could_not_load_is_refused_before_work(
    weights, activations, message
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expressible("compressed-tensors", weights, activations)
    check_expressible("native", weights, activations)


def test_patterns_match_the_named_layers_and_no_others() -> None:
    import re

    names = [f"model.layers.{b}.mlp.down_proj.weight" for b in (0, 11)]
    names.append("model.layers.3.self_attn.q_proj.weight")
    (down, query) = [pattern.removeprefix("re:") for pattern in layer_patterns(names)]
    assert [b for b in range(20) if re.match(down, f"model.layers.{b}.mlp.down_proj")] == [0, 11]
    assert re.match(query, "model.layers.3.self_attn.q_proj")
    assert not re.match(query, "model.layers.13.self_attn.q_proj")


@pytest.fixture
def native(make) -> Path:
    return make("w2", Case("llama", 2, 16, False, format="native"))[0]


def edit(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


DAMAGES = {
    "version": (lambda c: c["quantization_config"].update(sliderquant_version=9), "version 9"),
    "no weights": (lambda c: c["quantization_config"].pop("weights"), "how its weights are packed"),
    "bits": (
        lambda c: next(iter(c["quantization_config"]["weights"].values())).update(bits=40),
        "40 bits",
    ),
    "other bits": (
        lambda c: next(iter(c["quantization_config"]["weights"].values())).update(bits=7),
        "its config asks for",
    ),
    "unknown layer": (
        lambda c: c["quantization_config"]["weights"].update(
            {"model.x.weight": {"bits": 4, "group_size": None, "sym": True}}
        ),
        "names a weight that the model lacks",
    ),
    "base": (lambda c: c.pop("base_model_type"), "no base_model_type"),
    "family": (lambda c: c.update(base_model_type="bert"), "not supported"),
    "layers": (lambda c: c.update(num_hidden_layers=9), "lacks|names a weight"),
    "type": (lambda c: c.update(hidden_size=1.5), "describes no model"),
    "negative": (lambda c: c.update(num_key_value_heads=-1), "describes no model"),
    "no heads": (lambda c: c.update(num_attention_heads=0), "describes no model"),
    "width": (lambda c: c.update(vocab_size=11), "its config asks for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_native_config_that_does_not_fit_is_one_clear_error(damage, native) -> None:
    change, message = DAMAGES[damage]
    edit(native / "config.json", change)
    with pytest.raises(InputError, match=message):
        sliderquant.load(native)


def test_damaged_native_files_are_one_clear_error(native, tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        sliderquant.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no native sliderquant model"):
        sliderquant.load(tmp_path / "source w2")
    with pytest.raises(InputError, match="other formats do not hold"):
        export(ExportConfig(model=str(tmp_path / "source w2"), out=str(tmp_path / "x")))
    weights = native / "sliderquant.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            sliderquant.load(native)
        with pytest.raises(InputError, match="damaged"):
            export(ExportConfig(model=str(native), out=str(tmp_path / "x")))
    tensors = load_file_bytes(whole, tmp_path)
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, weights)
    with pytest.raises(InputError, match="lacks"):
        sliderquant.load(native)
    save_file({**tensors, "surplus": torch.ones(1)}, weights)
    with pytest.raises(InputError, match="surplus"):
        sliderquant.load(native)
    (native / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        sliderquant.load(native)


def load_file_bytes(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole").write_bytes(data)
    return load_file(folder / "whole")
