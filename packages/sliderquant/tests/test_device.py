"""What a GPU would refuse, on fake tensors: wrong devices, and too much of a model on the card."""

import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from effml_common.cli import main
from sliderquant.adapters import native
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.shapes import decoder_shape
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits
from sliderquant.cli import COMMANDS
from sliderquant.commands import _estimates as estimates
from sliderquant.commands import _run_listener
from sliderquant.commands import bench as bench_command
from sliderquant.commands import eval as eval_command
from sliderquant.commands.bench import kernel_on
from sliderquant.commands.eval import evaluate
from sliderquant.commands.inspect import make_plan
from sliderquant.commands.quantize import quantize
from sliderquant.config import (
    BenchConfig,
    DemoConfig,
    EvalConfig,
    QuantizeConfig,
    SensitivityConfig,
    SliderConfig,
)
from sliderquant.method import block_rounding, expert_rounding, window_training
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.calibration import calibrate
from sliderquant.method.error_compensation import corrected_weight, round_layers
from sliderquant.method.moments import GroupMoments
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
    moments = GroupMoments(
        weight=fake_card.tensor(6, 16),
        through_weight=False,
        second=fake_card.tensor(16, 16, dtype=torch.float64),
        cross=fake_card.tensor(16, 6, dtype=torch.float64),
        strength=fake_card.tensor(),
    )
    (weight,) = round_layers(*corrected_weight(moments), [6], fmt)
    assert weight.codes.device == weight.scale.device == fake_card.device
    assert weight.dequantize().device == fake_card.device


@pytest.fixture
def known_numbers(monkeypatch) -> None:
    """What the host reads off the device: fake tensors have no values."""
    monkeypatch.setattr(block_rounding, "wait_for", lambda value: 1.0)


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
    name, abits, cache, fake_decoder, fake_card, known_numbers
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


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_rounded_on_the_card_with_few_waits(
    name, fake_decoder, fake_card, known_numbers, monkeypatch
) -> None:
    """Each of four experts gets half of the 24 tokens."""
    waits = []
    monkeypatch.setattr(
        expert_rounding, "wait_for", lambda values: waits.append(1) or [12] * len(values)
    )
    decoder = fake_decoder(name, num_hidden_layers=1)
    decoder.model.config._experts_implementation = "batched_mm"  # the default asks for the driver
    learnables = fresh_learnables(decoder, SliderConfig(**SETTINGS), torch.float32)
    tokens = torch.zeros(2, 12, dtype=torch.int64)

    def on_block(block: int) -> None:
        for linear in learnables[block].linears:
            assert linear.closed_form.codes.device == fake_card.device

    config = SliderConfig(**SETTINGS)
    calibrate(decoder, tokens, [], learnables, config, on_block=on_block, cache=kept)
    assert (
        len(waits) == 5
    )  # one for the counts; for each weight the rows of a batch, and the activity


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


@pytest.mark.parametrize("stored_as", ["full precision", "native", "compressed-tensors"])
def test_eval_in_the_stored_type_puts_nothing_wider_on_the_card(
    stored_as, tiny, save, tmp_path, monkeypatch
) -> None:
    # A folder in bfloat16, quantized or not.
    directory, text = save("llama"), tmp_path / "text.txt"
    tiny("llama").to(torch.bfloat16).save_pretrained(directory)
    if stored_as != "full precision":
        source, directory = directory, tmp_path / "quantized"
        quantize(
            QuantizeConfig(
                model=str(source), calib=(str(text),), out=str(directory), format=stored_as,
                group_size=8, nsamples=2, seqlen=16,
            )
        )  # fmt: skip

    # Parameters, as they are when the model, or one of its tensors, goes to the device.
    moved, opened = [], []
    to, read = PreTrainedModel.to, native.safe_open

    def move(self, *words, **more):
        moved.extend(p.dtype for p in self.parameters() if p.is_floating_point())
        return to(self, *words, **more)

    monkeypatch.setattr(PreTrainedModel, "to", move)
    monkeypatch.setattr(
        native, "safe_open", lambda *words, **more: opened.append(more) or read(*words, **more)
    )
    seen = []
    monkeypatch.setattr(
        eval_command,
        "perplexity",
        lambda logits, batches: seen.append(logits(next(iter(batches)))) or 1.0,
    )
    evaluate(
        EvalConfig(model=str(directory), text=(str(text),), dtype="stored", out=str(tmp_path / "e"))
    )
    assert bool(moved) == (stored_as != "native")
    assert [more["device"] for more in opened] == (["cpu"] if stored_as == "native" else [])
    assert set(moved) <= {torch.bfloat16}
    assert seen[0].dtype == torch.bfloat16


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


def test_the_time_of_a_window_is_read_when_the_device_is_done(monkeypatch) -> None:
    done = []
    monkeypatch.setattr(_run_listener, "synchronize", lambda device: done.append(device))
    monkeypatch.setattr(_run_listener.time, "monotonic", lambda: done.append("clock") or 1.0)
    clock = _run_listener.WindowClock(
        SimpleNamespace(stages=1, windows=[[0], [1]], block_visits=2), 0, torch.device("cuda:0")
    )
    result = SimpleNamespace(window=[0], step=1, ratio=1.0, first_loss=1.0, last_loss=0.5)
    clock.tell(result)
    assert done == ["clock", torch.device("cuda:0"), "clock"]


def test_bench_reads_the_clock_when_the_device_is_done(tiny, tokens, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(bench_command, "synchronize", lambda device: done.append("waited"))
    monkeypatch.setattr(
        bench_command.time, "perf_counter", lambda: done.append("clock") or len(done)
    )
    bench_command.measure(tiny("llama"), tokens[:1], 2)
    assert done == ["waited", "clock"] * 4  # before and after the prompt, before and after decoding


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_the_estimate_of_a_block_is_within_a_factor_of_two_and_a_half(
    name, tiny, monkeypatch
) -> None:
    """In CPU seconds of one thread; the whole command is held to a factor of two by hand."""
    monkeypatch.setattr(estimates.time, "perf_counter", time.process_time)
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    decoder = TransformersDecoder(tiny(name, max_position_embeddings=128, **sizes))
    config = SliderConfig(**{**SETTINGS, "nsamples": 24, "seqlen": 128})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(decoder.model.config.vocab_size, (24, 128), generator=generator)
    fmt = WeightFormat(bits=4, group_size=8, sym=True, dtype=torch.float32)
    learnables = fresh_learnables(decoder, config, torch.float32)
    job = SimpleNamespace(
        config=config,
        decoder=decoder,
        samples=tokens,
        learnables=learnables,
        plan=make_plan(config, decoder_shape(decoder), decoder.depth),
        formats=[
            dict.fromkeys(decoder.layout(block).linears, fmt) for block in range(decoder.depth)
        ],
    )
    expected = estimates.estimate_seconds(job)
    begin = time.process_time()
    calibrate(decoder, tokens, [], learnables, config)
    taken = time.process_time() - begin
    assert taken / 2.5 < expected < 2.5 * taken


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
