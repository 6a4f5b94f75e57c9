"""The bench command: two models of one value, one of them small."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import sliderquant
from effml_common.errors import InputError
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.native import load
from sliderquant.commands import bench as bench_command
from sliderquant.commands.bench import bench, held_bytes, unpack_layers_
from sliderquant.config import BenchConfig
from sliderquant.method.quantizer import WeightFormat, quantize_weight


@pytest.fixture
def native(tiny, tmp_path):
    source, out = tmp_path / "source", tmp_path / "native"
    tiny("llama", hidden_size=64).to(torch.bfloat16).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    fmt = WeightFormat(bits=2, group_size=16, sym=True, dtype=torch.bfloat16)
    writer = ModelWriter(out, source, format="native", dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        linear = "proj.weight" in name
        writer.write({name: quantize_weight(p.float(), fmt) if linear else p})
    writer.publish()
    return out


def test_the_dense_twin_computes_the_same_in_more_memory(native, tokens) -> None:
    packed, dense = sliderquant.load(native), unpack_layers_(sliderquant.load(native))
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
    assert held_bytes(dense) > 1.5 * held_bytes(packed)


def test_the_kernel_is_used_only_when_asked_for(native) -> None:
    for kernel in ("torch", "triton"):
        layers = [
            m for m in sliderquant.load(native, kernel=kernel).modules() if hasattr(m, "kernel")
        ]
        assert len(layers) == 21
        assert all(layer.kernel == (kernel == "triton") for layer in layers)


@pytest.mark.parametrize(
    ("kernel", "words"), [("torch", "in plain PyTorch"), ("triton", "with the Triton kernel")]
)
def test_bench_times_the_path_of_the_device_and_says_which(
    kernel, words, native, tmp_path, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(bench_command, "kernel_on", lambda device: kernel)
    monkeypatch.setattr(
        bench_command,
        "load",
        lambda model, device, kernel="torch": asked.append(kernel) or load(model, device),
    )
    report = bench(
        BenchConfig(model=str(native), prompt=4, tokens=1, repeats=1, out=str(tmp_path / "bench"))
    )
    assert asked == [kernel, "torch"]  # the packed model, then the one to unpack
    assert words in report.notes[0]


def test_both_models_are_timed_in_turns(native, tmp_path) -> None:
    report = bench(
        BenchConfig(model=str(native), prompt=8, tokens=3, repeats=2, out=str(tmp_path / "bench"))
    )
    assert [row.name for row in report.rows] == ["packed", "dense"]
    for row in report.rows:
        assert len(row.metrics["decode tokens/s"]) == len(row.metrics["prefill tokens/s"]) == 2
        assert min(row.metrics["decode tokens/s"]) > 0
    assert (tmp_path / "bench" / "run" / "report.json").exists()
    with pytest.raises(InputError, match="no native sliderquant model"):
        bench(BenchConfig(model=str(tmp_path / "source")))
