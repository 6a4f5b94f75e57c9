"""What a GPU would refuse, on fake tensors: wrong devices, and too much of a model on the card."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from effml_common.cli import main
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.shapes import decoder_shape
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits
from sliderquant.cli import COMMANDS
from sliderquant.commands import _estimates as estimates
from sliderquant.commands._estimates import estimate_rounding, measure_seconds
from sliderquant.commands.bench import kernel_on
from sliderquant.commands.inspect import make_plan
from sliderquant.config import (
    BenchConfig,
    DemoConfig,
    EvalConfig,
    QuantizeConfig,
    SensitivityConfig,
    SliderConfig,
)
from sliderquant.method import error_compensation, window_training
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.calibration import calibrate
from sliderquant.method.error_compensation import damped_hessian, round_weight
from sliderquant.method.quantizer import WeightFormat
from sliderquant.method.smoothing import smoothing_factors
from sliderquant.method.window_training import train_window

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4")
# Plain, with four norms and two windows, with fused projections.
FIRST = ("llama", "gemma3", "phi3")
SETTINGS = {"wbits": 4, "group_size": 8, "nsamples": 2, "seqlen": 12}


def kept(name: str, hidden: torch.Tensor) -> torch.Tensor:
    """A cache in the host's memory, as the one on disk."""
    return torch.empty(hidden.shape, dtype=hidden.dtype).copy_(hidden)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_is_rounded_where_it_is(symmetric, fake_card) -> None:
    fmt = WeightFormat(bits=3, group_size=8, sym=symmetric, dtype=torch.float16)
    moment = fake_card.tensor(16, 16, dtype=torch.float64)
    assert damped_hessian(moment).device == fake_card.device
    weight = round_weight(
        fake_card.tensor(6, 16), fmt, moment, fake_card.tensor(16, 6, dtype=torch.float64)
    )
    assert weight.codes.device == weight.scale.device == fake_card.device
    assert weight.dequantize().device == fake_card.device


@pytest.fixture
def two_columns(monkeypatch) -> None:
    """Column loops that stop after two columns: on fake tensors a column takes a second."""
    for name in ("round_columns_", "sweep_columns_"):
        loop = getattr(error_compensation, name)
        monkeypatch.setattr(error_compensation, name, lambda *args, loop=loop: loop(*args[:-1], 2))


@pytest.mark.parametrize(
    ("name", "abits", "cache"),
    [
        pytest.param("llama", 16, lambda name, hidden: hidden.clone(), id="llama-16"),
        *(
            pytest.param(name, 8, kept, id=name, marks=[] if name in FIRST else [pytest.mark.slow])
            for name in DENSE
        ),
    ],
)
def test_the_default_method_keeps_to_the_card(
    name, abits, cache, fake_decoder, fake_card, two_columns
) -> None:
    decoder = fake_decoder(name, num_hidden_layers=1, layer_types=None)
    config = SliderConfig(**SETTINGS, abits=abits)
    learnables = fresh_learnables(decoder, config, torch.float32)

    # Corrections and clipping are no part of this method; channel scales are.
    assert {p.device.type for made in learnables for p in made.linears.parameters()} == {"cpu"}
    assert {f.device.type for made in learnables for f in made.factors} <= {"cuda"}

    on_card = []

    def on_block(block: int) -> None:
        on_card.append(
            {linear.closed_form.codes.device.type for linear in learnables[block].linears}
        )
        for value in learnables[block].to_storage(decoder.tensors(block)).values():
            assert getattr(value, "codes", value).device == fake_card.device

    tokens = torch.zeros(2, 12, dtype=torch.int64)
    calibrate(decoder, tokens, [], learnables, config, on_block=on_block, cache=cache)
    assert on_card == [{"cuda"}] * decoder.depth

    # Codes of finished blocks leave the card, and come back to be simulated.
    for block, made in enumerate(learnables):
        assert {linear.closed_form.codes.device.type for linear in made.linears} == {"cpu"}
        simulated = made(decoder.tensors(block))
        assert {value.device for value in simulated.values()} == {fake_card.device}


@pytest.mark.parametrize("name", DENSE)
def test_evaluation_keeps_to_the_card(name, fake_decoder, fake_card) -> None:
    decoder = fake_decoder(name, num_hidden_layers=1, layer_types=None)
    fmt = ActivationFormat(bits=8, sym=True, attention=True)
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    assert simulated_logits(decoder, None, fmt)(tokens).device == fake_card.device


def test_a_scale_without_columns_is_made_where_the_weights_are(fake_decoder, fake_card) -> None:
    site = fake_decoder("llama").layout(0).sites[0]
    weights = {"other": fake_card.tensor(4, 4)}
    assert smoothing_factors(site, weights, {}).device == fake_card.device


def test_a_process_without_samples_sums_a_zero_on_the_card(
    fake_decoder, fake_card, monkeypatch
) -> None:
    class Seen(Exception):
        pass

    def seen(loss: torch.Tensor, parameters: list[torch.Tensor]) -> float:
        assert {loss.device} == {p.device for p in parameters} == {fake_card.device}
        raise Seen

    decoder = fake_decoder("llama")
    config = SliderConfig(**SETTINGS, method="slider")
    learnables = fresh_learnables(decoder, config, torch.float32)
    hidden = torch.empty(2, 12, 32)  # a cache on disk
    monkeypatch.setattr(window_training, "own_share", lambda index: index[:0])
    monkeypatch.setattr(window_training, "all_reduce_", seen)
    with pytest.raises(Seen):
        train_window(
            decoder, [0], learnables, hidden, hidden, ratio=1.0, config=config, seed=(0,),
            on_update=lambda loss: None,
        )  # fmt: skip


def test_a_model_moves_to_the_card_in_the_type_it_computes_in(tiny, save, monkeypatch) -> None:
    directory = save("llama")
    tiny("llama").to(torch.bfloat16).save_pretrained(directory)
    moved = []
    monkeypatch.setattr(
        PreTrainedModel, "to", lambda self, *args, **kwargs: moved.append(self.dtype) or self
    )
    load_any(directory, "cuda:0", upcast=False)
    load_any(directory, "cuda:0")
    assert moved == [torch.bfloat16, torch.float32]


def test_the_clock_is_read_when_the_device_is_done(monkeypatch) -> None:
    done = []
    monkeypatch.setattr(estimates, "synchronize", lambda device: done.append(device))
    assert estimates.measure_seconds(lambda: done.append("run"), torch.device("cpu")) >= 0
    assert done == ["run", torch.device("cpu"), "run", torch.device("cpu")]


def test_the_estimate_counts_the_column_loops(tiny, tokens, monkeypatch) -> None:
    decoder = TransformersDecoder(tiny("llama"))
    config = SliderConfig(**SETTINGS)
    job = SimpleNamespace(
        config=config,
        decoder=decoder,
        samples=tokens[:2],
        plan=make_plan(config, decoder_shape(decoder), decoder.depth),
        weights=WeightFormat(bits=4, group_size=8, sym=True, dtype=torch.float32),
    )
    asked = []
    monkeypatch.setattr(estimates, "measure_seconds", lambda run, device: 1.0)
    monkeypatch.setattr(
        estimates, "estimate_rounding", lambda weight, fmt: asked.append(weight.shape) or 100.0
    )
    seconds = estimates.estimate_seconds(job)
    assert seconds == 3 * (estimates.ROUNDING_PASSES * 2 + 7 * 100)
    assert len(asked) == len(set(asked)) == 4  # q and o, k and v, gate and up, down


def test_the_time_of_a_weight_is_within_a_factor_of_four() -> None:
    fmt = WeightFormat(bits=4, group_size=64, sym=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(512, 256, generator=generator) for _ in range(2))
    moment = (x.T @ x).double()
    cross = torch.zeros(256, 512, dtype=torch.float64)
    cpu = torch.device("cpu")
    expected = estimate_rounding(weight, fmt)
    taken = measure_seconds(lambda: round_weight(weight, fmt, moment, cross), cpu)
    assert taken / 4 < expected < 4 * taken


@pytest.mark.parametrize(
    "config",
    [BenchConfig, DemoConfig, EvalConfig, QuantizeConfig, SensitivityConfig],
)
def test_every_command_that_computes_takes_the_best_device_there_is(config) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    assert defaults["device"] == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "MODEL", "--calib", "TEXT", "--device", "mps"], "no mps device"),
        (["quantize", "MODEL", "--calib", "TEXT", "--device", "cuda:99"], "cuda:99 is not there"),
        (["demo", "--device", "warp"], "device 'warp' is unknown"),
        (["sensitivity", "MODEL", "--text", "TEXT", "--device", "xpu:9"], "xpu:9 is not there"),
        (["bench", "MODEL", "--device", "cuda:99"], "cuda:99 is not there"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    words, message, model_directory, text_file, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(model_directory), "TEXT": str(text_file)}
    assert main("sliderquant", "sliderquant", COMMANDS, [names.get(w, w) for w in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_bench_multiplies_packed_weights_with_the_kernel_on_a_gpu() -> None:
    assert kernel_on(torch.device("cuda:0")) == "triton"
    assert kernel_on(torch.device("cpu")) == "torch"
