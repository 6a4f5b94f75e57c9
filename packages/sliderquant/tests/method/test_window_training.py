"""Training a window as a card does it: bfloat16, whole weights, and losses that are read late."""

import math

import pytest
import torch

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits, simulated_weights
from sliderquant.config import SliderConfig
from sliderquant.method import pieces as pieces_module
from sliderquant.method import window_passes, window_training
from sliderquant.method.calibration import calibrate
from sliderquant.method.decoder import run_blocks
from sliderquant.method.sampling import select_samples
from sliderquant.method.window_training import (
    CalibrationDivergedError,
    UpdateLog,
    train_window_guarded,
)

CPU, CARD = torch.device("cpu"), torch.device("cuda")
SETTINGS = {"method": "slider", "wbits": 3, "group_size": 8, "nsamples": 4, "seqlen": 12}
SETTINGS |= {"batch_size": 2, "epochs": 4, "lr_lora": 1e-3}


@pytest.fixture
def card_layout(monkeypatch) -> None:
    """The CPU takes whole weights, keeps them in the forward pass, and reads losses late."""
    monkeypatch.setattr(window_training, "RECOMPUTE_ABOVE", 0)
    for module in (window_training, pieces_module):
        monkeypatch.setattr(module, "is_accelerator", lambda device: True)


@pytest.fixture
def bfloat16(monkeypatch) -> None:
    """The CPU runs windows and relay under its own bfloat16 autocast."""
    for module in (window_training, window_passes):
        monkeypatch.setattr(
            module, "forward_precision", lambda device: torch.autocast("cpu", torch.bfloat16)
        )


def trained(model, tokens, config):
    """Calibrate two windows; returns learnables, losses of the updates and results of the windows."""
    decoder = TransformersDecoder(model)
    learnables = fresh_learnables(decoder, config, torch.float32)
    losses, results = [], []
    calibrate(
        decoder, tokens, [[0, 1], [1, 2]], learnables, config,
        on_update=losses.append, on_window=results.append,
    )  # fmt: skip
    return decoder, learnables, losses, results


def state(learnables) -> list[torch.Tensor]:
    return [value.clone() for block in learnables for value in block.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_layout_of_a_card_changes_no_bit(name, tiny, tokens, request) -> None:
    config = SliderConfig(**SETTINGS, abits=8)
    _, plain, *told = trained(tiny(name), tokens, config)
    request.getfixturevalue("card_layout")
    _, laid_out, *told_late = trained(tiny(name), tokens, config)
    assert same(state(plain), state(laid_out))
    assert told == told_late


@pytest.mark.parametrize(
    ("name", "abits"), [("llama", 16), ("gemma3", 8), ("qwen3_moe", 16), ("phi3", 16)]
)
def test_windows_in_bfloat16_are_as_good_as_in_float32(name, abits, tiny, tokens, request) -> None:
    config = SliderConfig(**SETTINGS, abits=abits)
    errors, last_losses = [], []
    for fixture in (None, "bfloat16"):
        if fixture:
            request.getfixturevalue(fixture)
        decoder, learnables, _, results = trained(tiny(name), tokens, config)
        assert all(p.dtype == torch.float32 for block in learnables for p in block.parameters())
        logits = simulated_logits(decoder, simulated_weights(decoder, learnables))(tokens)
        exact = simulated_logits(decoder, None)(tokens)
        errors.append((logits - exact).square().mean().item())
        last_losses.append([result.last_loss for result in results])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert last_losses[1] == pytest.approx(last_losses[0], rel=0.1)
    assert last_losses[1] != last_losses[0]


def test_weights_are_simulated_in_float32_and_multiplied_in_bfloat16(tiny) -> None:
    decoder = TransformersDecoder(tiny("llama"))
    block = fresh_learnables(decoder, SliderConfig(**SETTINGS, channel_scale="on"), torch.bfloat16)[
        0
    ]
    with torch.no_grad():
        for linear in block.linears:
            linear.lora_b.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    expected = block(decoder.tensors(0))
    with torch.autocast("cpu", torch.bfloat16):
        simulated = block(decoder.tensors(0))
    for name, value in expected.items():
        # What is stored in bfloat16 loses nothing.
        assert torch.equal(simulated[name].float(), value), name
        is_weight = name in decoder.layout(0).linears
        assert simulated[name].dtype == (torch.bfloat16 if is_weight else torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_relay_and_targets_keep_to_the_card_in_bfloat16(
    name, fake_decoder, fake_card, monkeypatch
) -> None:
    decoder = fake_decoder(name)
    seen, types = [], set()
    original = decoder.run_block

    def run_block(block, hidden, weights=None, activations=None):
        types.add((weights or {})["mlp.down_proj.weight"].dtype)
        return original(block, hidden, weights, activations)

    def record(decoder, window, learnables, inputs, targets, **rest):
        seen.append((inputs.device, inputs.dtype, targets.device, targets.dtype))
        return 1.0, 0.0, 0

    monkeypatch.setattr(decoder, "run_block", run_block)
    monkeypatch.setattr(window_passes, "train_window_guarded", record)
    config = SliderConfig(**SETTINGS, gamma=1.0)
    learnables = fresh_learnables(decoder, config, torch.float32)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    calibrate(decoder, tokens, [[0], [1, 2]], learnables, config)
    assert seen == 2 * [(fake_card.device, torch.float32) * 2]
    # The full-precision model's, and the simulated one's.
    assert types == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(("device", "told"), [(CPU, [1, 2, 3, 4]), (CARD, [0, 0, 3, 3])])
def test_losses_reach_the_caller_in_order_and_from_a_card_some_at_a_time(
    device, told, monkeypatch
) -> None:
    monkeypatch.setattr(window_training, "ACCELERATOR_UPDATES_PER_READING", 3)
    losses = []
    log = UpdateLog(device, losses.append)
    counts = []
    for update in range(4):
        log.add(torch.tensor(update / 3), torch.tensor(1.0))
        counts.append(len(losses))
    log.read()
    log.read()
    assert counts == told
    assert losses == log.losses == [torch.tensor(update / 3).item() for update in range(4)]


@pytest.mark.parametrize("place", [0, 1])
def test_what_came_before_a_bad_update_is_told_first(place) -> None:
    losses = []
    log = UpdateLog(CARD, losses.append)
    for update in range(3):
        values = [torch.tensor(float(update)), torch.tensor(1.0)]
        values[place] = torch.tensor(math.inf) if update == 2 else values[place]
        log.add(*values)
    with pytest.raises(CalibrationDivergedError, match="inf"):
        log.read()
    assert losses == [0.0, 1.0]


@pytest.mark.parametrize("bad_update", [1, 3])
def test_a_late_notice_of_divergence_leads_to_the_same_window(
    bad_update, tiny, tokens, monkeypatch, request
) -> None:
    """The first try breaks down at an update; the second one runs at half the rate."""
    decoder = TransformersDecoder(tiny("llama"))
    config = SliderConfig(**SETTINGS)
    inputs = decoder.block_inputs(tokens)
    targets = run_blocks(decoder, [0, 1], inputs, 2)
    compute, calls = window_training.compute_gradients_, []

    def break_down(simulate, x_q, wanted, *rest):
        calls.append(len(calls) + 1)
        return compute(simulate, x_q, wanted * (math.nan if len(calls) == bad_update else 1), *rest)

    monkeypatch.setattr(window_training, "compute_gradients_", break_down)
    outcomes = []
    for fixture in (None, "card_layout"):
        if fixture:
            request.getfixturevalue(fixture)
        calls.clear()
        losses = []
        learnables = fresh_learnables(decoder, config, torch.float32)
        told = train_window_guarded(
            decoder, [0, 1], learnables, inputs, targets, ratio=0.5, config=config, seed=(0,),
            on_update=losses.append,
        )  # fmt: skip
        outcomes.append((told, losses, state(learnables)))
    (told, losses, at_once), (told_late, losses_late, late) = outcomes
    assert told == told_late
    assert told[2] == 1
    assert losses == losses_late
    assert len(losses) == bad_update - 1 + 4  # 2 epochs of 2 batches in a stage
    assert same(at_once, late)


@pytest.mark.parametrize("numbers", [[], [2], [3, 0, 3]])
def test_samples_are_selected_as_an_index_does(numbers) -> None:
    hidden = torch.randn(4, 2, 3)
    index = torch.tensor(numbers, dtype=torch.int64)
    selected = select_samples(hidden, index)
    assert torch.equal(selected, hidden[index])


def test_a_loss_of_half_precision_states_is_float32(tiny) -> None:
    decoder = TransformersDecoder(tiny("llama"))
    learnables = fresh_learnables(decoder, SliderConfig(**SETTINGS), torch.float32)
    optimizer = window_training.window_optimizer(learnables[:1], (1e-3, 1e-2, 1e-3), CPU)
    factor = learnables[0].linears[0].lora_a

    def simulate(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + factor.sum().bfloat16()

    hidden = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    loss, norm = window_training.compute_gradients_(
        simulate, hidden, hidden, 1, learnables[:1], optimizer
    )
    assert loss.dtype == norm.dtype == torch.float32
    error = (1 + factor.detach().sum().bfloat16()).float() - 1
    torch.testing.assert_close(loss.detach(), error.square())


def test_a_relative_loss_weighs_all_tokens_alike(tiny) -> None:
    decoder = TransformersDecoder(tiny("llama"))
    learnables = fresh_learnables(decoder, SliderConfig(**SETTINGS), torch.float32)[:1]
    optimizer = window_training.window_optimizer(learnables, (1e-3, 1e-2, 1e-3), CPU)
    factor = learnables[0].linears[0].upper

    def simulate(hidden):
        return hidden + 0 * factor.sum()

    # One token has hidden states a thousand times as large; the last one is zero.
    sizes = torch.tensor([1.0, 1000.0, 2.0, 0.0]).view(1, 4, 1)
    targets = sizes * torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    inputs = targets + 0.1 * sizes
    loss, _ = window_training.compute_gradients_(
        simulate, inputs, targets, 1, learnables, optimizer, relative=True
    )
    errors = (inputs - targets).square().mean(-1)[0, :3] / targets.square().mean(-1)[0, :3]
    torch.testing.assert_close(loss, errors.sum() / 4)
    assert errors.max() < 2 * errors.min()


@pytest.mark.parametrize(
    ("device", "fused"), [(CPU, None), (CARD, True), (torch.device("mps"), None)]
)
def test_one_kernel_updates_many_tensors_on_cuda(device, fused, tiny) -> None:
    decoder = TransformersDecoder(tiny("llama"))
    learnables = fresh_learnables(decoder, SliderConfig(**SETTINGS), torch.float32)
    optimizer = window_training.window_optimizer(learnables, (1e-3, 1e-2, 1e-3), device)
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
