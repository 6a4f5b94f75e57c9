"""Resume of a training with every source of randomness, and proof that each saved part matters."""

import math
import random

import pytest
import torch
from torch import nn

from effml_common import checkpoint
from effml_common.checkpoint import (
    restore_training_state,
    rng_state,
    set_rng_state,
    training_state,
)
from effml_common.errors import CheckpointError, NonFiniteError
from effml_common.stopping import check_finite

STEPS, STOP, BATCH = 40, 17, 8


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, generator=generator)
    return x, (x[:, :3].sum(dim=1) > 0).long()


class Trainer:
    """Dropout, input noise, python's and torch's generators, shuffling, momentum, cosine rate."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        random.seed(1)
        self.model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.order: list[int] = []
        self.position = 0
        self.losses: list[float] = []

    def step(self) -> None:
        x, y = data()
        if self.position >= len(self.order):
            self.order, self.position = torch.randperm(len(x)).tolist(), 0
        index = self.order[self.position : self.position + BATCH]
        self.position += BATCH
        noisy = x[index] + 0.1 * torch.randn(BATCH, 10) + 0.01 * random.random()
        loss = nn.functional.cross_entropy(self.model(noisy), y[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())

    def state(self):
        return training_state(
            self.model,
            self.optimizer,
            self.scheduler,
            order=self.order,
            position=self.position,
        )


def uninterrupted() -> Trainer:
    trainer = Trainer()
    for _ in range(STEPS):
        trainer.step()
    return trainer


def resumed(tmp_path, drop: str | None = None) -> Trainer:
    first = Trainer()
    for _ in range(STOP):
        first.step()
    tensors, state = first.state()
    checkpoint.save(tmp_path, STOP, tensors, state)
    found = checkpoint.latest(tmp_path)
    second = Trainer()
    torch.manual_seed(99)
    random.seed(99)
    fresh = training_state(second.model, second.optimizer, second.scheduler)[1]
    if drop in ("rng", "optimizer", "scheduler"):
        found.state[drop] = fresh[drop]
    extra = restore_training_state(found, second.model, second.optimizer, second.scheduler)
    if drop != "loader":
        second.order, second.position = extra["order"], extra["position"]
    for _ in range(STEPS - STOP):
        second.step()
    return second


def test_resumed_run_is_bit_identical(tmp_path) -> None:
    whole, second = uninterrupted(), resumed(tmp_path)
    assert second.losses == whole.losses[STOP:]
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("part", ["rng", "loader", "optimizer", "scheduler"])
def test_dropping_any_part_breaks_the_resume(tmp_path, part) -> None:
    whole, second = uninterrupted(), resumed(tmp_path, drop=part)
    assert second.losses != whole.losses[STOP:]


def test_all_generators_return_to_their_state() -> None:
    draw = pytest.importorskip("numpy").random.rand
    state = rng_state()
    drawn = (random.random(), draw(), torch.rand(1).item())
    set_rng_state(state)
    assert drawn == (random.random(), draw(), torch.rand(1).item())


def test_checkpoint_of_another_model_is_named(tmp_path) -> None:
    trainer = Trainer()
    checkpoint.save(tmp_path, 1, *trainer.state())
    other = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        restore_training_state(
            checkpoint.latest(tmp_path), other, torch.optim.AdamW(other.parameters())
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_non_finite_numbers_are_named_with_step_term_and_checkpoint(bad, where, tmp_path) -> None:
    loss = torch.tensor(bad if where == "loss" else 1.0, requires_grad=True)
    norm = torch.tensor(bad if where == "norm" else 1.0)
    with pytest.raises(NonFiniteError, match="step 12") as caught:
        check_finite(loss, norm, step=12, term="imitation", last_good=tmp_path / "step-9")
    assert "step-9" in str(caught.value)
    assert ("imitation" if where == "loss" else "gradient norm") in str(caught.value)


def test_finite_numbers_pass() -> None:
    assert check_finite(torch.tensor(1.0), 2.0, step=1, term="x") is None


@pytest.mark.cuda
def test_cuda_generators_and_tensors_come_back(tmp_path) -> None:
    model = nn.Linear(4, 4).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, *training_state(model, optimizer))
    drawn = torch.rand(5, device="cuda")
    other = nn.Linear(4, 4).cuda()
    restored = torch.optim.AdamW(other.parameters())
    restore_training_state(checkpoint.latest(tmp_path), other, restored)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    assert torch.equal(other.weight, model.weight)
    assert restored.state[other.weight]["exp_avg"].is_cuda


def test_random_states_of_other_hardware_are_warned_about(capsys) -> None:
    state = rng_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 99
    if not torch.cuda.is_available():
        set_rng_state(state)
        assert "99 CUDA devices" in capsys.readouterr().err


@pytest.fixture
def a_card(monkeypatch) -> list[object]:
    """A machine with one card; returns the states that were given to it."""
    given: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state of the card"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.append(state))
    return given


def test_a_card_that_is_not_in_use_is_left_alone(a_card, monkeypatch, capsys) -> None:
    # A forked loading process looks the same: torch calls its CUDA not initialized.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    state = rng_state()
    assert "cuda" not in state
    set_rng_state(state)
    assert not a_card
    assert not capsys.readouterr().err


def test_a_card_in_use_is_saved_and_put_back(a_card, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_rng_state(rng_state())
    assert a_card == ["state of the card"]
    assert not capsys.readouterr().err
