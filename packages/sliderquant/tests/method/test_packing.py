"""Bit packing against Python integers and against the library whose layout it is."""

import pytest
import torch

from sliderquant.method.packed import PackedLinear, packed_linear
from sliderquant.method.packing import (
    pack_bits,
    packed_tensors,
    unpack_bits,
    unpacked_weight,
    words,
)
from sliderquant.method.quantizer import WeightFormat, fake_quantize, quantize_weight

BITS = [2, 3, 4, 5, 6, 7, 8]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 128])
def test_a_row_is_one_little_endian_number(bits, count) -> None:
    codes = random_codes(bits, 3, count)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, words(count, bits))
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert number == sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(stream))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_that_of_compressed_tensors(bits) -> None:
    from compressed_tensors.compressors.pack_quantized import helpers

    codes = random_codes(bits, 6, 100)
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_bits(codes, bits), theirs)
    back = helpers.unpack_from_int32(pack_bits(codes, bits), bits, codes.shape)
    assert torch.equal(back, signed)
    # Zero points go along the rows.
    assert torch.equal(
        pack_bits(codes.T, bits).T, helpers.pack_to_int32(signed, bits, packed_dim=0)
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("group", "shape"), [(None, (5, 100)), (16, (7, 48)), (16, (3, 7, 48))])
def test_a_stored_weight_reads_back_as_it_was_simulated(bits, sym, group, shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    fmt = WeightFormat(bits=bits, group_size=group, sym=sym, dtype=torch.bfloat16)
    stored = packed_tensors(quantize_weight(weight, fmt))
    assert stored["weight_shape"].tolist() == list(shape)
    assert ("weight_zero_point" in stored) == (not sym)
    back = unpacked_weight(
        stored["weight_packed"],
        stored["weight_scale"],
        stored.get("weight_zero_point"),
        shape[-1],
        fmt,
    )
    simulated = fake_quantize(weight.flatten(0, -2), fmt).view(shape)
    assert torch.equal(back.dequantize().float(), simulated)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_multiplies_by_the_simulated_weight(bias) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 10, bias=bias)
    fmt = WeightFormat(bits=3, group_size=16, sym=False, dtype=torch.float32)
    stored = packed_tensors(quantize_weight(linear.weight.detach(), fmt))
    x = torch.randn(2, 5, 48)
    want = x.double() @ fake_quantize(linear.weight.detach(), fmt).double().T
    if bias:
        want += linear.bias.detach().double()
    packed, scale, zero = (stored[f"weight_{key}"] for key in ("packed", "scale", "zero_point"))
    got = packed_linear(x, packed, scale, zero, linear.bias, fmt)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    layer = PackedLinear(linear, fmt)
    layer.load_state_dict(
        {**stored, **({"bias": linear.bias.detach()} if bias else {})}, assign=True
    )
    assert torch.equal(layer(x), got)
    assert layer(x[:, :0]).shape == (2, 0, 10)


def test_two_bits_in_groups_of_64_take_a_seventh_of_bfloat16() -> None:
    fmt = WeightFormat(bits=2, group_size=64, sym=False, dtype=torch.bfloat16)
    stored = packed_tensors(quantize_weight(torch.randn(256, 1024), fmt))
    size = sum(tensor.nbytes for tensor in stored.values())
    assert 256 * 1024 * 2 / size == pytest.approx(7, rel=0.02)
