"""Layers with bits of their own and layers that are left out, through the command line."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sliderquant
from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits, simulated_weights
from sliderquant.adapters.text import calibration_samples, read_tokens
from sliderquant.cli import COMMANDS
from sliderquant.config import SliderConfig
from sliderquant.method.calibration import calibrate, rounding_of_inputs
from sliderquant.method.packing import unpack_bits
from sliderquant.method.quantizer import fake_quantize
from sliderquant.method.round_to_nearest import rtn_weights
from sliderquant.method.windows import make_windows

FAST = ["--nsamples", 8, "--seqlen", 64, "--group-size", 16, "--batch-size", 4]
MIXED = ["--bits-for", "layers.0.*=8", "*.down_proj=8", "v_proj=3", "--ignore", "layers.3.self_attn.*",
         "layers.4.mlp.up_proj"]  # fmt: skip
TRAINED = {
    "compensated": [],
    "combined": ["--shallow", 1, "--deep", 1],
    "slider": ["--epochs", 2, "--lr-lora", "3e-3", "--lr-lwc", "3e-2", "--shallow", 1, "--deep", 1],
}
SETTINGS = {
    "nsamples": 8, "seqlen": 64, "group_size": 16, "batch_size": 4,
    "bits_for": ("layers.0.*=8", "*.down_proj=8", "v_proj=3"),
    "ignore": ("layers.3.self_attn.*", "layers.4.mlp.up_proj"),
}  # fmt: skip
TRAINED_SETTINGS = {
    "compensated": {},
    "combined": {"shallow": 1, "deep": 1},
    "slider": {"epochs": 2, "lr_lora": 3e-3, "lr_lwc": 3e-2, "shallow": 1, "deep": 1},
}


def run(*words: object, check: int | None = 0) -> SimpleNamespace:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main("sliderquant", "sliderquant", COMMANDS, list(map(str, words)))
    assert check is None or code == check, err.getvalue()
    return SimpleNamespace(code=code, stdout=out.getvalue(), stderr=err.getvalue())


def expected_bits(layer: str) -> int:
    """Bits of a layer such as "3.mlp.up_proj", spelled out."""
    if layer.startswith("3.self_attn") or layer == "4.mlp.up_proj":
        return 16
    if layer.endswith("v_proj"):
        return 3
    return 8 if layer.startswith("0.") or layer.endswith("down_proj") else 4


@pytest.fixture(scope="module", params=["compensated", "combined", "slider"])
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def native(method, model_directory, text_file, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("mixed") / "native"
    words = [*FAST, *MIXED, "--method", method, *TRAINED[method], "--format", "native"]
    done = run("quantize", model_directory, "--calib", text_file, *words, "--out", out, "--json")
    return SimpleNamespace(out=out, report=json.loads(done.stdout), stderr=done.stderr)


def calibrated(model_directory: Path, text_file: Path, config: SliderConfig):
    """Calibrate the model in memory; returns decoder, learnables and the model itself."""
    loaded = load_model(model_directory)
    decoder = TransformersDecoder(loaded.model)
    stream = read_tokens([str(text_file)], loaded.tokenizer, loaded.model)
    samples = calibration_samples(stream, config.nsamples, config.seqlen, config.seed)
    learnables = fresh_learnables(decoder, config, torch.float32)
    windows = [] if config.method == "compensated" else make_windows(decoder.depth, config)
    calibrate(decoder, samples, windows, learnables, config)
    return decoder, learnables, loaded.model


def test_layers_hold_codes_of_their_bits_and_the_source_where_left_out(
    native, model_directory
) -> None:
    before = load_file(model_directory / "model.safetensors")
    after = load_file(native.out / "sliderquant.safetensors")
    seen = set()
    for name, weight in before.items():
        if not name.startswith("model.layers.") or "proj" not in name:
            continue
        layer = name.removeprefix("model.layers.").removesuffix(".weight")
        bits = expected_bits(layer)
        seen.add(bits)
        if bits == 16:
            assert torch.equal(after[name], weight), name
            assert f"{name}_packed" not in after
            continue

        # So many bits are stored, and they are made use of.
        packed, columns = after[f"{name}_packed"], weight.shape[1]
        assert packed.shape[1] == -(-columns * bits // 32), name
        codes = unpack_bits(packed, bits, columns)
        assert len(codes.unique()) > 2 ** (bits - 1), name
    assert seen == {3, 4, 8, 16}


def test_every_format_computes_what_the_calibration_simulated(
    native, method, model_directory, text_file, tmp_path
) -> None:
    config = SliderConfig(**SETTINGS, **TRAINED_SETTINGS[method], method=method)
    decoder, learnables, _ = calibrated(model_directory, text_file, config)
    tokens = torch.arange(40).view(2, 20)
    expected = simulated_logits(decoder, simulated_weights(decoder, learnables))(tokens)

    run("export", native.out, "--out", tmp_path / "ct")
    run("export", native.out, "--format", "dense", "--out", tmp_path / "dense")
    models = {
        "native": sliderquant.load(native.out),
        "ct": AutoModelForCausalLM.from_pretrained(tmp_path / "ct"),
        "dense": AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
    }
    for name, model in models.items():
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_report_card_and_run_say_which_layer_has_which_bits(native) -> None:
    words = "not rounded (layers.3.self_attn.q_proj"
    assert words in native.stderr
    assert any(words in note for note in native.report["notes"])
    card = (native.out / "README.md").read_text()
    assert words.replace("_", r"\_") in card
    assert "W4 mixed g16 sym" in card
    assert r"bits_for layers.0.\*=8 \*.down\_proj=8 v\_proj=3" in card


def test_ignored_layers_read_exact_activations_in_every_format(
    model_directory, text_file, tmp_path
) -> None:
    out = tmp_path / "ct"
    ignored = ["--ignore", "layers.1.*", "layers.3.mlp.down_proj", "layers.2.self_attn.[qo]_proj"]
    words = [*FAST, "--group-size", "none", "--wbits", 4, "--abits", 4, *ignored]
    run("quantize", model_directory, "--calib", text_file, *words, "--out", out)
    run("quantize", model_directory, "--calib", text_file, *words, "--format", "native",
        "--out", tmp_path / "native")  # fmt: skip
    before = load_file(model_directory / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("model.layers.1."))

    changes = {"group_size": None, "bits_for": (), "ignore": tuple(ignored[1:]), "abits": 4}
    config = SliderConfig(**{**SETTINGS, **changes})
    decoder, learnables, _ = calibrated(model_directory, text_file, config)
    weights, tokens = simulated_weights(decoder, learnables), torch.arange(40).view(2, 20)
    activations = rounding_of_inputs(config, learnables)
    assert activations is not None
    assert len(activations.exact_inputs) == 10
    expected = simulated_logits(decoder, weights, activations)(tokens)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out)(tokens, use_cache=False).logits
        packed = sliderquant.load(tmp_path / "native")(tokens, use_cache=False).logits
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ignore",
    [
        ("layers.1.*",),
        ("layers.0.*", "layers.4.*"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
        ("mlp.*",),
        ("self_attn.*",),
        ("q_proj", "up_proj"),
    ],
)
@pytest.mark.parametrize("abits", [16, 8])
def test_both_models_pass_through_layers_that_are_left_out(
    ignore, abits, model_directory, text_file
) -> None:
    config = SliderConfig(**{**SETTINGS, "bits_for": (), "ignore": ignore, "abits": abits})
    loaded = load_model(model_directory)
    decoder = TransformersDecoder(loaded.model)
    stream = read_tokens([str(text_file)], loaded.tokenizer, loaded.model)
    samples = calibration_samples(stream, 8, 64, config.seed)
    learnables = fresh_learnables(decoder, config, torch.float32)
    kept = {}

    def cache(name, hidden):
        kept[name] = hidden.clone()
        return kept[name]

    calibrate(decoder, samples, [], learnables, config, cache=cache)

    # Behind the last block: the model as it is, and the model as it is stored.
    activations = rounding_of_inputs(config, learnables)
    weights = simulated_weights(decoder, learnables)
    exact = simulated = decoder.block_inputs(samples)
    with torch.no_grad():
        for block in range(decoder.depth):
            exact = decoder.run_block(block, exact)
            simulated = decoder.run_block(block, simulated, weights[block], activations)
    assert (simulated - exact).abs().max() > 1e-3
    torch.testing.assert_close(kept["x_fp"], exact, rtol=1e-4, atol=1e-4)
    # A code of rounded activations may fall on the other side.
    close = (kept["x_q"] - simulated).abs() < 1e-3 * simulated.abs().max()
    assert close.float().mean() > 0.99


@pytest.mark.parametrize("method_name", ["combined", "slider"])
def test_windows_skip_blocks_that_are_left_out(
    method_name, model_directory, text_file, tmp_path
) -> None:
    words = [*FAST, "--method", method_name, "--schedule", "block", "--ignore", "layers.1.*",
             "layers.4.*", "--format", "dense", "--out", tmp_path / "out"]  # fmt: skip
    words += ["--epochs", 2] if method_name == "slider" else []
    run("quantize", model_directory, "--calib", text_file, *words)
    before = load_file(model_directory / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in before:
        is_kept = "proj" not in name or name.split(".")[2] in ("1", "4")
        assert torch.equal(before[name], after[name]) == is_kept, name


def test_nearest_rounding_has_the_same_bits(decoder) -> None:
    config = SliderConfig(**SETTINGS)
    formats = fresh_learnables(decoder, config, torch.float32)[4].rounded_formats()
    weights = rtn_weights(decoder, 4, formats)
    assert "mlp.up_proj.weight" not in weights
    for name, weight in weights.items():
        fmt = formats[name]
        assert fmt.bits == expected_bits(f"4.{name.removesuffix('.weight')}")
        assert torch.equal(weight, fake_quantize(decoder.tensors(4)[name], fmt))


def test_resuming_with_other_patterns_is_refused(model_directory, text_file, tmp_path) -> None:
    words = [model_directory, "--calib", text_file, *FAST, "--method", "slider", *TRAINED["slider"],
             "--out", tmp_path / "out"]  # fmt: skip
    run("quantize", *words, "--bits-for", "down_proj=8")
    for other, name in ((["--bits-for", "down_proj=6"], "bits_for"),
                        (["--bits-for", "down_proj=8", "--ignore", "o_proj"], "ignore")):  # fmt: skip
        done = run("quantize", *words, *other, "--resume", "auto", check=2)
        assert f"was made with {name} [" in done.stderr
    run("quantize", *words, "--bits-for", "down_proj=8", "--resume", "auto")


@pytest.fixture(scope="module")
def sensitivity_report(model_directory, held_out_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sensitivity") / "s"
    run("sensitivity", model_directory, "--text", held_out_file, "--group-size", 16, "--nsamples", 3,
        "--by", "linear", "--metric", "mse", "--out", out)  # fmt: skip
    return out


def test_what_stands_out_in_a_report_gets_more_bits(
    sensitivity_report, model_directory, text_file, tmp_path
) -> None:
    # By hand from the figures of the report.
    document = json.loads((sensitivity_report / "run" / "report.json").read_text())
    values = {row["name"]: row["metrics"]["mse"]["mean"] for row in document["rows"]}
    median = sorted(values.values())[len(values) // 2]
    standing_out = {name for name, value in values.items() if value > 2 * median}
    assert 0 < len(standing_out) < len(values)

    out = tmp_path / "out"
    words = ["quantize", model_directory, "--calib", text_file, *FAST, "--format", "native"]
    run(*words, "--sensitivity", sensitivity_report, "--ignore",
        "layers.2.mlp.up_proj", "--bits-for", "layers.0.self_attn.v_proj=5", "--out", out)  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    for name, entry in config["quantization_config"]["weights"].items():
        _, _, block, layer = name.removesuffix(".weight").split(".", 3)
        expected = 8 if f"block {block} {layer}" in standing_out else 4
        expected = 5 if (block, layer) == ("0", "self_attn.v_proj") else expected
        assert entry["bits"] == expected, name

    # The report's own advice says the same, and the run can be repeated without the report.
    advice = document["notes"][-1].partition("--bits-for ")[2].replace("'", "").split()
    assert {f"layers.{name[6:].replace(' ', '.')}=8" for name in standing_out} == set(advice)
    written = (out / "run" / "config.yaml").read_text()
    assert advice[0] in written
    assert "sensitivity: null" in written


def test_reports_that_do_not_fit_are_refused(
    sensitivity_report, model_directory, text_file, held_out_file, tmp_path, save
) -> None:
    report = sensitivity_report / "run" / "report.json"
    words = ["--calib", text_file, *FAST, "--sensitive-bits", 8, "--out", tmp_path / "out"]

    other = save("llama")
    done = run("quantize", other, *words, "--sensitivity", report, check=2)
    assert "is of another model: it has 35 rows for 5 blocks, this model 3 blocks" in done.stderr

    run("sensitivity", model_directory, "--text", held_out_file, "--group-size", 16, "--nsamples", 2,
        "--mode", "prefix", "--out", tmp_path / "prefix")  # fmt: skip
    done = run("quantize", model_directory, *words, "--sensitivity", tmp_path / "prefix", check=2)
    assert "has mode prefix" in done.stderr

    (tmp_path / "report.json").write_text('{"rows": []}')
    done = run("quantize", model_directory, *words, "--sensitivity", tmp_path, check=2)
    assert "is no report of this version's sensitivity command" in done.stderr
    done = run("quantize", model_directory, *words, "--sensitivity", tmp_path / "nowhere", check=2)
    assert "cannot be read (No such file or directory)" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ignore", "lm_head"], "lm_head is never rounded; leave it out"),
        (["--ignore", "down_prj"], "fits no layer; use names such as down_proj"),
        (["--bits-for", "down_proj"], "give PATTERN=BITS with 2 to 8 bits"),
        (
            ["--no-sym", "--bits-for", "o_proj=8"],
            "asymmetric compressed-tensors weights of several",
        ),
        (["--sensitivity", "runs/s"], "runs/s cannot be read"),
        (["--sensitive-bits", "8"], "add --sensitivity with a report"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    words, message, model_directory, text_file, tmp_path
) -> None:
    out = tmp_path / "out"
    done = run(
        "quantize", model_directory, "--calib", text_file, *FAST, *words, "--out", out, check=2
    )
    assert message in done.stderr.splitlines()[-1]
    assert not out.exists()


def test_fused_layers_of_several_kinds_are_named_once(model_directory, text_file, tmp_path) -> None:
    words = ["quantize", model_directory, "--calib", text_file, *FAST]
    done = run(*words, "--ignore", "k_proj", "--out", tmp_path / "ct")
    assert done.stderr.count("vLLM needs one format") == 1
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of layers 0-4" in done.stderr
    done = run(*words, "--ignore", "layers.2.*", "--out", tmp_path / "blocks")
    assert "vLLM" not in done.stderr


def test_inspect_counts_the_bits_of_each_layer(model_directory) -> None:
    words = ["inspect", "--model", model_directory, "--group-size", 16, "--json"]
    plain = json.loads(run(*words).stdout)
    mixed = json.loads(run(*words, "--bits-for", "layers.0.*=8", "--ignore", "layers.1.*").stdout)
    assert plain["bits_per_weight"] == 5
    assert plain["layer_bits"] is None
    assert mixed["bits_per_weight"] == pytest.approx((9 + 16 + 3 * 5) / 5)
    assert mixed["rounded_blocks"] == 4
    assert mixed["layer_bits"].startswith("21 layers in 4 bits; 7 in 8 bits (layers.0.*); 7 not")
    # Layers that are left out fit any group size.
    run(*words[:3], "--group-size", 64, "--ignore", "mlp.*")
