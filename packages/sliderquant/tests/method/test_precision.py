"""The types in which a device computes, on a fake card."""

import pytest
import torch

from sliderquant.method.precision import (
    forward_precision,
    product_dtype,
    tf32_products,
    without_autocast,
)

CPU = torch.device("cpu")


def test_a_card_multiplies_in_bfloat16_inside_the_context_only(fake_card) -> None:
    x = fake_card.tensor(4, 4)
    with forward_precision(fake_card.device):
        assert (x @ x).dtype == product_dtype(x) == torch.bfloat16
        assert (x + x).dtype == torch.float32
        with without_autocast(fake_card.device):
            assert (x @ x).dtype == product_dtype(x) == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == product_dtype(x) == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_the_context_is_left_after_an_error(fake_card) -> None:
    with pytest.raises(KeyError), forward_precision(fake_card.device):
        raise KeyError
    assert not torch.is_autocast_enabled("cuda")


def test_float64_is_never_shortened(fake_card) -> None:
    x = fake_card.tensor(4, 4, dtype=torch.float64)
    with forward_precision(fake_card.device):
        assert (x @ x).dtype == product_dtype(x) == torch.float64


@pytest.mark.parametrize("name", ["cpu", "meta", "mps"])
def test_other_devices_compute_in_the_types_they_are_given(name) -> None:
    device = torch.device(name)
    before = torch.backends.cuda.matmul.fp32_precision
    with forward_precision(device), tf32_products(device), without_autocast(device):
        assert product_dtype(torch.ones(2, 2)) == torch.float32
        assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_processor_multiplies_in_bfloat16_if_it_has_instructions_for_it(
    capabilities, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    x = torch.ones(4, 4)
    with forward_precision(CPU):
        assert (x @ x).dtype == product_dtype(x) == dtype
        assert (x + x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_products_are_tf32_inside_the_context_only() -> None:
    def precision() -> tuple[str, bool]:
        matmul = torch.backends.cuda.matmul
        return torch.get_float32_matmul_precision(), matmul.allow_tf32

    assert precision() == ("highest", False)
    with tf32_products(torch.device("cuda")):
        assert precision() == ("high", True)
        with tf32_products(torch.device("cuda")):
            assert precision() == ("high", True)
        assert precision() == ("high", True)
    assert precision() == ("highest", False)
