"""sliderquant's hot paths on a device without values: nothing in the wrong place, costs as committed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.hot_paths import HotPath, Kit, Step, count
from benchmarks.sliderquant.cuda import (
    CALIBRATING,
    PATHS,
    RESCALING,
    ROUNDING,
    UPDATE,
    block_learnables,
    update_of_blocks,
)

from sliderquant.method import sampling, window_training
from sliderquant.method.sampling import select_samples, to_device
from sliderquant.method.window_training import UpdateLog, compute_gradients_, window_optimizer
from tests.cuda.budgets import assert_within_budget, budgets, each
from tests.cuda.counter import Counter


@pytest.mark.parametrize("path", each(PATHS))
def test_a_hot_path_stays_within_its_budget(path: HotPath) -> None:
    assert_within_budget("sliderquant", path)


def test_an_update_of_a_window_needs_few_launches_and_no_wait() -> None:
    for name in (UPDATE, RESCALING):
        committed = budgets()["sliderquant"][name]
        assert committed["launches"] <= 3000
        assert not committed["waits"]
        assert not committed["copies"]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_of_a_window_puts_nothing_in_the_wrong_place(
    recompute, rounded, monkeypatch
) -> None:
    if recompute:
        monkeypatch.setattr(window_training, "RECOMPUTE_ABOVE", 0)
        # This fake device has gradients and tells devices apart, but checkpoints nothing.
        monkeypatch.setattr(window_training, "checkpoint", lambda run, *args, **_: run(*args))
    update = update_of_blocks(rounded)
    path = HotPath("update", update, fake="gpu:0", warm_up=1, allow=CALIBRATING)
    cost = count(path, tiny=True)
    assert not cost["waits"]
    assert not cost["copies"]


def test_a_process_without_samples_sums_zeros_on_the_device(monkeypatch) -> None:
    summed = []
    group = SimpleNamespace(is_initialized=lambda: True, all_reduce=summed.append)
    monkeypatch.setattr(sampling, "distributed", group)

    def build(kit: Kit, tiny: bool) -> Step:
        learnables = [block_learnables(kit, tiny)]
        optimizer = window_optimizer(learnables, (1e-4, 1e-2, 1e-3), torch.device("cuda"))
        nothing = kit.randn(0, 16, 64)

        def step() -> None:
            loss, norm = compute_gradients_(
                lambda hidden: hidden, nothing, nothing, 1, learnables, optimizer
            )
            assert {loss.device, norm.device, summed[-1].device} == {torch.device("gpu:0")}
            optimizer.step()

        return step

    cost = count(HotPath("nothing to do", build, fake="gpu:0", warm_up=1), tiny=True)
    assert not cost["waits"]
    assert not cost["copies"]


def test_losses_are_read_once_in_eight_updates() -> None:
    with Counter("gpu:0", {"window_training.py:read": 1.0}) as counter:
        losses: list[float] = []
        log = UpdateLog(torch.device("gpu:0"), losses.append)
        loss, norm = (torch.empty((), device="gpu:0") for _ in range(2))
        with counter.counting() as cost:
            for _ in range(16):
                log.add(loss, norm)
            log.read()
    assert losses == [1.0] * 16
    assert dict(cost.waits) == {"window_training.py:read": 2}


def test_hidden_states_of_files_reach_the_card_without_a_wait(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    index = torch.tensor([2, 0])
    with Counter("cuda:0") as counter:
        hidden = torch.empty(4, 16, 64)
        with counter.counting() as cost:
            batch = to_device(select_samples(hidden, index), torch.device("cuda:0"))
        assert batch.device == torch.device("cuda:0")
    assert dict(cost.copies) == {"to device sampling.py:to_device": 1}
    assert not cost.waits


def test_samples_on_the_card_are_selected_without_a_copy_of_their_numbers() -> None:
    index = torch.tensor([2, 0])
    with Counter("cuda:0") as counter:
        hidden = torch.empty(4, 16, 64, device="cuda:0")
        with counter.counting() as cost:
            assert select_samples(hidden, index).shape == (2, 16, 64)
    assert not cost.copies
    assert not cost.waits


def test_a_packed_product_is_one_launch() -> None:
    packed, dequantized = (replace(path, scaled=1.0) for path in PATHS[:2])
    few, many = (count(path, tiny=True)["launches"] for path in (packed, dequantized))
    # 7 layers in 2 blocks: unpacking takes several launches, the kernel is one.
    assert many - few >= 7 * 2 * 5


def test_rounding_a_block_of_llama_3_8b_keeps_to_what_was_promised() -> None:
    cost = budgets()["sliderquant"][ROUNDING]
    assert cost["launches"] <= 20_000
    assert cost["peak"] <= 12 * 2**30
    assert 32 * cost["step_ms"] < 6 * 60_000  # all blocks of the model
