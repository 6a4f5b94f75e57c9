"""The layout of GPTQ checkpoints, unpacked here by its definition."""

import json

import pytest
import torch
from safetensors.torch import load_file

from effml_common.cli import main
from effml_common.errors import ConfigError, InputError
from sliderquant.adapters.gptq_layout import check_gptq, gptq_tensors
from sliderquant.cli import COMMANDS
from sliderquant.method.quantizer import WeightFormat, quantize_weight

F16 = torch.float16


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along the first axis, lowest bits first."""
    parts = [packed.long() >> shift & 2**bits - 1 for shift in range(0, 32, bits)]
    return torch.stack(parts, dim=1).flatten(0, 1)


def dequantized(tensors: dict[str, torch.Tensor], bits: int, stored_minus_one: bool):
    codes = unpacked(tensors["qweight"], bits)  # [in, out]
    zeros = unpacked(tensors["qzeros"].T, bits).T + stored_minus_one  # [groups, out]
    group = tensors["g_idx"].long()
    return ((codes - zeros[group]) * tensors["scales"][group].float()).T


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layout_holds_the_same_weight(bits, sym, group_size) -> None:
    fmt = WeightFormat(
        bits=bits, group_size=group_size, sym=sym, dtype=torch.float32, float16_digits=11
    )
    weight = quantize_weight(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), fmt)
    tensors = gptq_tensors(weight, "layer")
    assert tensors["qweight"].shape == (96 * bits // 32, 64)
    read = dequantized(tensors, bits, stored_minus_one=sym)
    torch.testing.assert_close(read, weight.dequantize(), rtol=0, atol=0)


def test_scales_beyond_float16_and_odd_sizes_are_refused() -> None:
    fmt = WeightFormat(bits=4, group_size=None, sym=True, dtype=torch.float32)
    with pytest.raises(InputError, match="scales that float16 does not hold"):
        gptq_tensors(quantize_weight(torch.randn(32, 32), fmt), "layer")
    with pytest.raises(InputError, match="is 12 x 32"):
        gptq_tensors(quantize_weight(torch.randn(12, 32), fmt), "layer")


def test_several_formats_and_layers_left_alone_are_refused() -> None:
    four = WeightFormat(bits=4, group_size=None, sym=True, dtype=F16)
    three = WeightFormat(bits=3, group_size=None, sym=True, dtype=F16)
    with pytest.raises(ConfigError, match="one format for all"):
        check_gptq({"a_proj.weight": four, "b_proj.weight": three}, ["a_proj.weight"])
    with pytest.raises(ConfigError, match="leaves some"):
        check_gptq({"a_proj.weight": four}, ["a_proj.weight", "b_proj.weight"])
    with pytest.raises(ConfigError, match="has 3"):
        check_gptq({"a_proj.weight": three}, ["a_proj.weight"])


def test_export_writes_a_folder_that_says_how_to_read_it(
    model_directory, text_file, tmp_path
) -> None:
    native, out = tmp_path / "native", tmp_path / "gptq"

    def run(*words: object, code: int = 0) -> None:
        assert main("sliderquant", "sliderquant", COMMANDS, [*map(str, words)]) == code

    run(
        "quantize", model_directory, "--calib", text_file, "--for", "gguf", "--format", "native",
        "--nsamples", 8, "--seqlen", 64, "--out", native,
    )  # fmt: skip
    run("export", native, "--format", "gptq", "--out", out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    tensors = load_file(out / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj."
    inside = {name.removeprefix(layer): t for name, t in tensors.items() if layer in name}
    run("export", native, "--format", "dense", "--out", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")[layer + "weight"]
    read = dequantized(inside, 4, stored_minus_one=True)
    torch.testing.assert_close(read, dense, rtol=0, atol=0)
    assert "gptqmodel" in (out / "README.md").read_text()
