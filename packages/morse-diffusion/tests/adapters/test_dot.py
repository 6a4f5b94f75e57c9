"""The Dot and its files: shapes, shared weights, PEFT's layout, and what does not fit."""

import json

import pytest
import torch
from morse_tiny import ddim, tiny_conditional_unet, tiny_pixels, tiny_unet
from safetensors.torch import load_file, save_file

from effml_common.errors import InputError
from morse_diffusion.adapters.apply import apply_morse
from morse_diffusion.adapters.dot import DotShape, MorseDot
from morse_diffusion.adapters.dot.io import fingerprint
from morse_diffusion.commands.inspect import count_published
from morse_diffusion.errors import DotMismatchError, ShapeError, UnsupportedDenoiserError
from morse_diffusion.method.lora import LowRankResiduals
from morse_diffusion.method.schedule import MorsePlan


def inputs(channels: int = 3, side: int = 16, n: int = 2):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn((n, channels, side, side), generator=generator) for _ in range(3)]
    return (*x, torch.full((n,), 800.0), torch.full((n,), 600.0))


def lively(dot: MorseDot, seed: int = 3) -> MorseDot:
    """All of the Dot's own weights away from their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in dot.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return dot


def build(dash=None, **settings) -> MorseDot:
    torch.manual_seed(0)
    return MorseDot.build(
        dash or tiny_unet(), **{"m": 1, "channels": (8,), "lora_rank": 4, **settings}
    )


@torch.no_grad()
def test_an_untrained_dot_repeats_the_dash() -> None:
    assert float(build()(*inputs()).abs().max()) == 0


@pytest.mark.parametrize(
    ("m", "channels", "layers"), [(1, (8,), 1), (2, (4, 8), 1), (2, (4, 8), 2)]
)
@torch.no_grad()
def test_every_depth_consumes_its_skips_and_returns_the_sample_s_shape(m, channels, layers) -> None:
    dot = lively(build(m=m, channels=channels, layers=layers))
    side = 32
    assert dot(*inputs(side=side)).shape == (2, 3, side, side)


@torch.no_grad()
def test_each_input_reaches_the_residual() -> None:
    dot = lively(build())
    given = list(inputs())
    base = dot(*given)
    for i in range(5):
        changed = [*given]
        changed[i] = changed[i] + (0.5 if i < 3 else -100)
        assert float((dot(*changed) - base).abs().max()) > 1e-5, i


def test_only_the_dots_own_weights_are_its_parameters_and_learn() -> None:
    dash = tiny_unet()
    before = {k: v.clone() for k, v in dash.state_dict().items()}
    dot = lively(build(dash))
    assert not {id(p) for p in dot.parameters()} & {id(p) for p in dash.parameters()}
    dash.requires_grad_(False)
    dot(*inputs()).square().mean().backward()
    # conv_in, conv_norm_out and conv_out of the Dash are not shared; all that the Dot owns learns.
    assert [n for n, p in dot.named_parameters() if p.grad is None] == []
    assert all(torch.equal(v, before[k]) for k, v in dash.state_dict().items())


@torch.no_grad()
def test_folded_copies_give_what_the_live_weights_give_and_training_drops_them() -> None:
    dot = lively(build()).eval()
    live = dot(*inputs())
    torch.testing.assert_close(dot.fold_()(*inputs()), live, atol=1e-5, rtol=1e-5)
    lively(dot, seed=4)
    dot.train()
    assert not torch.allclose(dot(*inputs()), live, atol=1e-3)


def test_recomputing_blocks_in_the_backward_pass_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        dot = lively(build())
        dot.gradient_checkpointing = checkpointing
        dot(*inputs()).square().mean().backward()
        grads.append([p.grad.clone() for p in dot.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_a_folded_residual_is_the_two_layers_beside_the_frozen_one(kind) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 4, 4)
    residuals = LowRankResiduals({"layer": layer}, rank=3, alpha=6)
    residuals.up["layer"].normal_()
    if kind == "linear":
        side = x @ residuals.down["layer"].T @ residuals.up["layer"].T
    else:
        hidden = torch.nn.functional.conv2d(x, residuals.down["layer"], padding=1)
        side = torch.nn.functional.conv2d(hidden, residuals.up["layer"])
    folded = torch.func.functional_call(layer, residuals.folded_weights("layer", layer), x)
    torch.testing.assert_close(folded, layer(x) + 2 * side, atol=1e-5, rtol=1e-5)


def test_peft_reads_the_residuals_and_computes_the_same(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    dash = tiny_unet()
    dot = lively(build(dash))
    dot.save_pretrained(str(tmp_path))
    blocks = torch.nn.ModuleDict({"mid_block": dash.mid_block})
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    config.target_modules = [p for p in config.target_modules if p.startswith("mid_block")]
    model = peft.get_peft_model(blocks, config)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    mid = {k: v for k, v in stored.items() if ".mid_block." in k}
    result = peft.set_peft_model_state_dict(model, mid)
    assert not result.unexpected_keys
    h, emb = torch.randn(1, 16, 4, 4), torch.randn(1, 32)
    with torch.no_grad():
        theirs = model.base_model.model["mid_block"](h, emb)
    # PEFT changed the first Dash in place; the same one again, for the Dot alone.
    with torch.no_grad():
        ours = lively(build(tiny_unet())).run_shared("mid_block", h, emb)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_dot_survives_a_round_trip_through_its_folder(tmp_path) -> None:
    dash = tiny_unet()
    dot = lively(build(dash)).eval()
    dot.save_pretrained(str(tmp_path / "dot"), {"family": "vp"})
    again = MorseDot.from_pretrained(str(tmp_path / "dot"), tiny_unet())
    assert torch.equal(again(*inputs()), dot(*inputs()))
    assert again.trained["family"] == "vp"
    names = {path.name for path in (tmp_path / "dot").iterdir()}
    assert names == {
        "config.json", "dot_blocks.safetensors", "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    own = {name for name, _ in dot.named_parameters() if not name.startswith("residuals.")}
    assert set(load_file(tmp_path / "dot" / "dot_blocks.safetensors")) == own  # no Dash weight


@torch.no_grad()
def test_text_class_and_guidance_reach_a_conditional_dot() -> None:
    dash = tiny_conditional_unet()
    dot = lively(build(dash, guidance=(2.0, 10.0)))
    given, text = inputs(4), torch.randn(2, 7, 32)
    base = dot(*given, {"encoder_hidden_states": text, "w": 3.0})
    other_text = dot(*given, {"encoder_hidden_states": -text, "w": 3.0})
    other_scale = dot(*given, {"encoder_hidden_states": text, "w": torch.tensor([3.0, 9.0])})
    assert float((base - other_text).abs().max()) > 1e-5
    assert torch.allclose(base[0], other_scale[0], atol=1e-5)
    assert float((base[1] - other_scale[1]).abs().max()) > 1e-5


def test_another_dash_is_refused_naming_both(tmp_path) -> None:
    dash = tiny_unet()
    build(dash).save_pretrained(str(tmp_path))
    other = tiny_unet()
    with torch.no_grad():
        other.mid_block.resnets[0].conv1.weight.mul_(-1)
    with pytest.raises(
        DotMismatchError, match=f"{fingerprint(dash)}, this is {fingerprint(other)}"
    ):
        MorseDot.from_pretrained(str(tmp_path), other)
    MorseDot.from_pretrained(str(tmp_path), other, strict=False)


@torch.no_grad()
def test_a_user_s_lora_beside_the_dash_s_weights_acts_as_if_it_were_merged(
    tmp_path, capsys
) -> None:
    peft = pytest.importorskip("peft")
    dash = tiny_conditional_unet()
    torch.manual_seed(0)
    lively(MorseDot.build(dash, m=1, channels=(8,), lora_rank=4)).save_pretrained(str(tmp_path))
    dot = MorseDot.from_pretrained(str(tmp_path), dash)
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    dash.add_adapter(lora)
    assert MorseDot.from_pretrained(str(tmp_path), dash).dash_fingerprint == fingerprint(dash)
    dot.prepare(dash, ddim())
    assert "has a LoRA" in capsys.readouterr().err
    merged = tiny_conditional_unet()
    for name, layer in dash.named_modules():
        if hasattr(layer, "base_layer"):
            merged.get_submodule(name).weight.add_(layer.get_delta_weight("default"))
    other = MorseDot.from_pretrained(str(tmp_path), merged, strict=False)
    given = inputs(channels=4)
    cond = {"encoder_hidden_states": torch.randn(2, 7, 32)}
    beside = dot(*given, cond)
    torch.testing.assert_close(beside, other(*given, cond), atol=1e-5, rtol=1e-4)


def test_weights_changed_after_loading_are_warned_about(tmp_path, capsys) -> None:
    dash = tiny_unet()
    build(dash).save_pretrained(str(tmp_path))
    dot = MorseDot.from_pretrained(str(tmp_path), dash)
    dot.prepare(dash, ddim())
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        dash.mid_block.resnets[0].conv1.weight.mul_(-1)
    dot.prepare(dash, ddim())
    assert "was not trained with" in capsys.readouterr().err


def test_the_same_dash_in_half_precision_is_the_same_dash() -> None:
    dash = tiny_unet()
    assert fingerprint(dash) == fingerprint(tiny_unet().to(torch.bfloat16))
    assert fingerprint(dash) == fingerprint(tiny_unet().half())


@pytest.mark.parametrize(
    ("name", "value"),
    [("family", "flow"), ("prediction", "v_prediction"), ("steps_of_process", 500)],
)
def test_another_process_than_that_of_training_is_refused(name, value, capsys) -> None:
    pipe = tiny_pixels()
    dot = build(pipe.unet)
    dot.trained = {"family": "vp", "prediction": "epsilon", "steps_of_process": 1000, name: value}
    with pytest.raises(DotMismatchError, match=f"{name.replace('_', ' ')} {value}"):
        apply_morse(pipe, dot, MorsePlan.uniform(2, 3))
    apply_morse(pipe, dot, MorsePlan.uniform(2, 3), strict=False).remove()
    assert "strict=False" in capsys.readouterr().err


def test_a_dot_beside_another_network_than_its_own_is_refused() -> None:
    pipe, other = tiny_pixels(), tiny_unet(channels=1)
    with pytest.raises(DotMismatchError, match="trained for Dash"):
        apply_morse(pipe, build(other), MorsePlan.uniform(2, 3))


@pytest.mark.parametrize(
    "damage", ["no config", "bad json", "format", "missing", "truncated", "shape"]
)
def test_a_damaged_folder_is_refused(damage, tmp_path) -> None:
    build().save_pretrained(str(tmp_path))
    config, blocks = tmp_path / "config.json", tmp_path / "dot_blocks.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "bad json":
        config.write_text("{")
    elif damage == "format":
        config.write_text(json.dumps({**json.loads(config.read_text()), "format": 9}))
    elif damage == "missing":
        blocks.unlink()
    elif damage == "truncated":
        blocks.write_bytes(blocks.read_bytes()[:-100])
    else:
        tensors = load_file(blocks)
        save_file({k: v[:1].clone() for k, v in tensors.items()}, blocks)
    with pytest.raises(DotMismatchError, match=r"holds no Dot|do not fit this Dash"):
        MorseDot.from_pretrained(str(tmp_path), tiny_unet())


@pytest.mark.parametrize(("side", "nearest"), [(12, "use 8 or 16"), (2, "use 8"), (18, "16 or 20")])
def test_a_side_that_cannot_be_halved_is_refused_with_the_nearest(side, nearest) -> None:
    if side == 12:
        dot = build(m=2, channels=(4, 8))
        nearest = "use 16"
    else:
        dot = build()
    with pytest.raises(ShapeError, match=nearest):
        dot(*inputs(side=side))


@pytest.mark.parametrize(
    "settings",
    [
        {"m": 0, "channels": ()},
        {"m": 2, "channels": (8,)},
        {"m": 1, "channels": (0,)},
        {"lora_rank": 0},
    ],
)
def test_a_shape_that_makes_no_dot_is_refused(settings) -> None:
    with pytest.raises(ShapeError, match=";"):
        DotShape(**{"m": 1, "channels": (8,), **settings})


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(UnsupportedDenoiserError, match="Linear is no denoiser"):
        MorseDot.build(torch.nn.Linear(2, 2))
    assert issubclass(UnsupportedDenoiserError, InputError)


def test_the_paper_s_dot_has_about_as_many_weights_as_published() -> None:
    counts = count_published()
    assert counts["weights of the Dash"] == 859_520_964
    assert 96e6 < counts["weights of the Dot, loralib form"] < 99e6
    assert 73e6 < counts["weights of the Dot, PEFT form"] < 75e6
    # Less than every layer of the UNet: its first and last convolution are not shared.
    assert (
        0
        < counts["weights of the Dot, PEFT form"] - counts["weights of the Dot as built here"]
        < 1e6
    )


def test_a_noise_schedule_is_all_that_training_takes_from_a_scheduler() -> None:
    from morse_diffusion.adapters.schedulers import process_of

    process = process_of(ddim(beta_start=1e-4))
    assert (process.family, process.steps, process.clip) == ("vp", 1000, None)
    assert process_of(ddim(clip_sample=True)).clip == 1.0
