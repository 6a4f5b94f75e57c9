"""One rule for --device in every package."""

import pytest
import torch

from effml_common.device import resolve_device
from effml_common.errors import InputError


@pytest.fixture
def two_cards(monkeypatch) -> list[torch.device]:
    """A machine with two CUDA cards; returns the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    return current


def test_auto_is_the_cpu_where_there_is_no_card_and_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    assert capsys.readouterr().err == "device: cpu\n"


def test_auto_is_the_first_card_and_makes_it_current(two_cards, capsys) -> None:
    assert resolve_device("auto") == torch.device("cuda:0")
    assert two_cards == [torch.device("cuda:0")]
    assert capsys.readouterr().err == "device: cuda:0 (Some Card)\n"


def test_a_card_can_be_named(two_cards) -> None:
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert two_cards == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_torchrun_takes_its_own_card(two_cards, monkeypatch, name) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_device(name) == torch.device("cuda:1")


def test_one_named_card_for_several_processes_is_refused(two_cards, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^device cuda:0 is one card for 2 processes; use cuda$"):
        resolve_device("cuda:0")


@pytest.mark.parametrize("name", ["tpu", "gpu", "", "cuda:", "cuda:x", "cuda:-1", "meta"])
def test_an_unknown_device_is_refused_with_the_choices(name) -> None:
    with pytest.raises(InputError, match=r"is unknown; use auto .*cuda:N, mps or xpu$"):
        resolve_device(name)


def test_a_card_beyond_the_last_is_refused_with_the_last(two_cards) -> None:
    with pytest.raises(InputError, match=r"finds 2 cuda devices\); use cuda:1$"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_a_kind_that_is_absent_is_refused(monkeypatch, kind) -> None:
    for backend in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"torch finds no {kind} device\); use cpu$"):
        resolve_device(kind)


def test_the_one_mps_device_has_no_number(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
