"""Files of the released code give the weights that its own equations give.

No released file was available, so files are made here with the names and shapes that its code saves
(deep-optimization/SliderQuant, ``slider_state_dict``), and its merge of the weights is written down a
second time, from the equations, in plain torch.
"""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from effml_common.errors import ConfigError, Interrupted
from sliderquant.adapters.released_parameters import read_released
from sliderquant.commands import _resumable
from sliderquant.commands.quantize import quantize
from sliderquant.config import QuantizeConfig

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LINEARS = [*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
RANK = 4


def released_file(model, path: Path, *, group_size=None, scales=None, power_of_two=False) -> dict:
    """Write what the released code would save for a model; returns its content.

    ``scales`` draws channel scales too (its mode slider; without them lora_only).
    """
    generator = torch.Generator().manual_seed(5)
    config = model.config
    key_rows = model.model.layers[0].self_attn.k_proj.weight.shape[0]
    blocks = {}
    for number, layer in enumerate(model.model.layers):
        tensors = OrderedDict()
        if scales:
            sizes = {"qkt": key_rows, "qkv": config.hidden_size, "out": key_rows}
            sizes |= {"fc1": config.hidden_size, "fc2": config.intermediate_size}
            for name, size in sizes.items():
                factor = 1 + 0.3 * torch.rand(size, generator=generator)
                if power_of_two:
                    factor = 2.0 ** torch.randint(-1, 2, (size,), generator=generator)
                tensors[f"{name}_smooth_scale"] = factor
                if name != "qkt":
                    tensors[f"{name}_smooth_shift"] = torch.zeros(size)
        for name in LINEARS:
            rows, columns = layer.get_submodule(name).weight.shape
            groups = rows * (columns // (group_size or columns))
            quantizer = f"{name}.weight_quantizer"
            tensors[f"{quantizer}.upbound_factor"] = 4 * torch.rand(groups, 1, generator=generator)
            tensors[f"{quantizer}.lowbound_factor"] = 4 * torch.rand(groups, 1, generator=generator)
            a = torch.randn(RANK, columns, generator=generator)
            tensors[f"{name}.lora_A.0"] = 0.1 * a
            tensors[f"{name}.lora_B.0"] = 0.1 * torch.randn(rows, RANK, generator=generator)
        blocks[number] = tensors
    torch.save(blocks, path)
    return blocks


def merged_as_released(layer, saved: dict[str, Tensor], config, bits: int, group_size) -> dict:
    """Return a block's parameters after the released code's weight_merge, in float32.

    OmniQuant's transformations with learned alpha, then W + BA / r, then its quantizer: range from
    sigmoid-clipped extremes, D = (hi - lo) / (2^b - 1), z = round(-lo / D).
    """
    weights = {name: p.detach().float().clone() for name, p in layer.named_parameters()}
    heads = config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def rows_(name: str, factor: Tensor, divide: bool) -> None:
        for kind, values in (("weight", factor[:, None]), ("bias", factor)):
            if divide and f"{name}.{kind}" in weights:
                weights[f"{name}.{kind}"] /= values
            elif f"{name}.{kind}" in weights:
                weights[f"{name}.{kind}"] *= values

    if "qkv_smooth_scale" in saved:
        expand = lambda s: s.view(-1, 1, head_dim).expand(-1, heads, -1).reshape(-1)  # noqa: E731
        for site, norm, readers in (
            ("qkv", "input_layernorm", ATTENTION),
            ("fc1", "post_attention_layernorm", ["mlp.up_proj", "mlp.gate_proj"]),
        ):
            alpha = saved[f"{site}_smooth_scale"]
            weights[f"{norm}.weight"] /= alpha
            for name in readers:
                weights[f"{name}.weight"] *= alpha
        rows_("self_attn.v_proj", saved["out_smooth_scale"], True)
        weights["self_attn.o_proj.weight"] *= expand(saved["out_smooth_scale"])
        rows_("self_attn.q_proj", expand(saved["qkt_smooth_scale"]), True)
        rows_("self_attn.k_proj", saved["qkt_smooth_scale"], False)
        rows_("mlp.up_proj", saved["fc2_smooth_scale"], True)
        weights["mlp.down_proj.weight"] *= saved["fc2_smooth_scale"]

    levels = 2**bits - 1
    for name in LINEARS:
        weight = weights[f"{name}.weight"]
        weight = weight + saved[f"{name}.lora_B.0"] @ saved[f"{name}.lora_A.0"] * (1 / RANK)
        groups = weight.reshape(-1, group_size or weight.shape[1])
        quantizer = f"{name}.weight_quantizer"
        high = groups.amax(1, keepdim=True) * saved[f"{quantizer}.upbound_factor"].sigmoid()
        low = groups.amin(1, keepdim=True) * saved[f"{quantizer}.lowbound_factor"].sigmoid()
        # A group of one sign would have a grid that cannot be stored.
        assert (high > 0).all()
        assert (low < 0).all()
        scale = ((high - low) / levels).clamp(1e-5, 1e4)
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, levels)
        weights[f"{name}.weight"] = ((codes - zero) * scale).view(weight.shape)
    return weights


def tensors_in(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def case(save, tmp_path):
    """Makes a tiny model, a file for it and the settings to read it with."""

    def make(
        family: str = "llama", *, group_size=None, scales=False, power_of_two=False, **changes
    ):
        folder = save(family, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        path = tmp_path / "slider_parameters.pth"
        saved = released_file(
            model, path, group_size=group_size, scales=scales, power_of_two=power_of_two
        )
        settings = {
            "model": str(folder), "parameters": str(path), "method": "slider", "sym": False,
            "wbits": 2, "group_size": group_size, "out": str(tmp_path / "out"), "device": "cpu",
            "format": "dense", "channel_scale": "on" if scales else "auto",
        }  # fmt: skip
        return model, saved, settings

    return make


def differing(model, saved, settings) -> dict[str, float]:
    """Return the largest difference of each parameter that is not equal to the released code's."""
    found, result = tensors_in(Path(settings["out"])), {}
    for number, layer in enumerate(model.model.layers):
        wanted = merged_as_released(
            layer, saved[number], model.config, settings["wbits"], settings["group_size"]
        )
        for name, value in wanted.items():
            ours = found[f"model.layers.{number}.{name}"]
            if not torch.equal(ours, value):
                result[f"{number}.{name}"] = (ours - value).abs().max().item()
    return result


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_weights_are_those_of_the_released_code_bit_for_bit(name, group_size, case) -> None:
    model, saved, settings = case(name, group_size=group_size)
    report = quantize(QuantizeConfig(**settings))
    assert differing(model, saved, settings) == {}
    assert "nothing was calibrated: parameters of slider_parameters.pth" in report.notes
    others = tensors_in(Path(settings["out"]))
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(others[outside], model.get_parameter(outside))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_channel_scales_that_are_powers_of_two_too(name, case) -> None:
    model, saved, settings = case(name, scales=True, power_of_two=True)
    quantize(QuantizeConfig(**settings))
    assert differing(model, saved, settings) == {}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_any_channel_scales_within_a_rounding(name, case) -> None:
    """We multiply by 1 / alpha where the released code divides by it: a last bit may differ."""
    model, saved, settings = case(name, scales=True, group_size=16)
    settings |= {"abits": 4, "act_sym": False, "quantize_attention": True}
    quantize(QuantizeConfig(**settings | {"wbits": 4}))
    assert all(value < 2e-6 for value in differing(model, saved, settings | {"wbits": 4}).values())


def test_a_run_without_corrections_or_clipping_is_read_too(case, tmp_path) -> None:
    model, saved, settings = case()
    for tensors in saved.values():
        for name in [n for n in tensors if "lora_" in n]:
            del tensors[name]
    torch.save(saved, settings["parameters"])
    quantize(QuantizeConfig(**settings))
    for tensors in saved.values():
        for name in LINEARS:
            rows, columns = model.model.layers[0].get_submodule(name).weight.shape
            tensors[f"{name}.lora_A.0"] = torch.zeros(RANK, columns)
            tensors[f"{name}.lora_B.0"] = torch.zeros(rows, RANK)
    assert differing(model, saved, settings) == {}

    # A bound that is infinite clips nothing.
    for tensors in saved.values():
        for name in [n for n in tensors if "bound_factor" in n]:
            del tensors[name]
    torch.save(saved, settings["parameters"])
    settings |= {"out": str(tmp_path / "open"), "lwc": False}
    quantize(QuantizeConfig(**settings))
    for tensors in saved.values():
        for name in LINEARS:
            rows = model.model.layers[0].get_submodule(name).weight.shape[0]
            for side in ("up", "low"):
                key = f"{name}.weight_quantizer.{side}bound_factor"
                tensors[key] = torch.full((rows, 1), torch.inf)
    assert differing(model, saved, settings) == {}


def test_the_packed_folder_computes_what_the_dense_one_does(case, tokens, tmp_path) -> None:
    _, _, settings = case(group_size=16)
    text = {"eval_text": (str(tmp_path / "text.txt"),)}
    rows = {}
    for stored in ("dense", "compressed-tensors"):
        out = tmp_path / stored
        report = quantize(QuantizeConfig(**settings | text | {"format": stored, "out": str(out)}))
        rows[stored] = {row.name: row.metrics for row in report.rows}
    assert rows["dense"] == rows["compressed-tensors"]
    assert list(rows["dense"])[-1] == "SliderQuant (released parameters)"
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / stored) for stored in rows]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)

    # The card says where the numbers come from.
    card = (tmp_path / "dense/README.md").read_text()
    assert "Parameters of the released code:\n\n- `slider_parameters.pth` (sha256" in card
    assert "In measurement " in card
    assert "lora_rank 4" in card
    assert not any(word in card for word in ("seed", "epochs", "nsamples"))


def test_an_interrupted_run_goes_on_to_the_same_bits(case, monkeypatch, tmp_path) -> None:
    _, _, settings = case()
    quantize(QuantizeConfig(**settings | {"out": str(tmp_path / "whole")}))

    class Stop:
        """Asks to stop after the first block."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def agree(self):
            return True

        def check(self):
            raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(_resumable, "StopSignal", Stop)
        with pytest.raises(Interrupted):
            quantize(QuantizeConfig(**settings))
    assert not (tmp_path / "out/config.json").exists()
    quantize(QuantizeConfig(**settings, resume="auto"))
    ours, whole = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert json.loads((tmp_path / "out/config.json").read_text())["sliderquant"]["rounded"]


UP = "mlp.up_proj"
CHANGES = {
    "missing": (lambda b: b[1].pop(f"{UP}.lora_A.0"), "block 1: 'mlp.up_proj.lora_A.0' is missing"),
    "unknown": (lambda b: b[0].update(Q_1=torch.ones(2)), "block 0: 'Q_1' has no place here; docs"),
    "rank": (
        lambda b: b[2].update({f"{UP}.lora_A.0": torch.ones(8, 32)}),
        r"has shape \[8, 32\], model and settings ask for \[4, 32\]; add --lora-rank 8",
    ),
    "groups": (
        lambda b: b[0].update({f"{UP}.weight_quantizer.upbound_factor": torch.ones(96, 1)}),
        r"shape \[96, 1\], model and settings ask for \[48, 1\]; give the --group-size",
    ),
    "scales": (
        lambda b: b[0].update(qkv_smooth_scale=torch.ones(32)),
        "'qkv_smooth_scale' has no place here; add --channel-scale on",
    ),
    "bounds": (
        lambda b: b[0].pop(f"{UP}.weight_quantizer.upbound_factor"),
        "upbound_factor' is missing; add --no-lwc",
    ),
    "nan": (lambda b: b[0][f"{UP}.lora_A.0"].fill_(torch.nan), "holds NaN or infinity"),
    "integers": (lambda b: b[0].update(x=torch.ones(2, dtype=torch.int8)), "'x' is no tensor"),
    "text": (lambda b: b[0].update(x="y"), "'x' is no tensor"),
    "block": (lambda b: b.pop(1), "holds blocks 0 to 2, 2 in all and the model has 3"),
    "list": (lambda b: b.update({1: [1]}), "block 1: no named tensors"),
    "names": (lambda b: b.update({"model": {}}), "is no dictionary of block numbers"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named_in_one_line(change, case) -> None:
    _, saved, settings = case()
    apply, message = CHANGES[change]
    apply(saved)
    torch.save(saved, settings["parameters"])
    with pytest.raises(ValueError, match=message) as caught:
        quantize(QuantizeConfig(**settings))
    assert "\n" not in str(caught.value)
    assert not Path(settings["out"]).exists()


def test_shifts_and_scales_per_query_head_are_refused(case) -> None:
    _, saved, settings = case(scales=True)
    saved[0]["out_smooth_scale"] = torch.ones(32)
    torch.save(saved, settings["parameters"])
    with pytest.raises(ValueError, match="gqa_scales mean are not read"):
        quantize(QuantizeConfig(**settings))
    saved[0]["out_smooth_scale"] = torch.ones(16)
    saved[0]["qkv_smooth_shift"][3] = 1
    torch.save(saved, settings["parameters"])
    with pytest.raises(ValueError, match="'qkv_smooth_shift' is not zero; shifts cannot be stored"):
        quantize(QuantizeConfig(**settings))
    with pytest.raises(ValueError, match="'fc1_smooth_scale' has no place here; add --channel-s"):
        quantize(QuantizeConfig(**settings | {"channel_scale": "off"}))


class Code:
    """An object whose pickle runs code when it is read carelessly."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_files_that_are_no_tensors_are_refused_and_run_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({0: {"x": Code()}}, "code.pth")
    Path("text.pth").write_text("no archive")
    Path("empty.pth").touch()
    for name in ("code.pth", "text.pth", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name} is no file of tensors alone") as caught:
            read_released(name)
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists()
    with pytest.raises(ValueError, match=r"missing\.pth cannot be read"):
        read_released("missing.pth")


def test_other_families_are_refused(save, tmp_path) -> None:
    config = QuantizeConfig(
        model=str(save("mistral")), parameters="p.pth", method="slider", sym=False, group_size=None,
        out=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not read mistral; give a model of llama, qwen2"):
        quantize(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "compensated"}, "not of compensated; add --method slider"),
        ({"sym": True}, "sym is true with parameters; add --no-sym"),
        ({"calib": ("t",)}, "parameters and calib were given; leave one of them out"),
        ({"rotate": "r1"}, "rotate is r1; give the model as it was rotated"),
        ({"epochs": 60, "nsamples": 8}, "epochs, nsamples: nothing is trained with parameters"),
        ({"wbits": 16}, "wbits is 16; give the bits for which"),
    ],
)
def test_settings_that_do_not_go_with_parameters_are_refused(settings, message) -> None:
    fitting = {"model": "m", "parameters": "p.pth", "method": "slider", "sym": False}
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**fitting | settings)
    with pytest.raises(ConfigError, match="calib names no file; give one or more text files"):
        QuantizeConfig(model="m")
