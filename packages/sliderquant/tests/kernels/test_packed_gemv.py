"""The Triton kernel against the plain function; under Triton's interpreter where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sliderquant.method.packed import PackedLinear
from sliderquant.method.quantizer import WeightFormat

CHECK = """
import json, sys, torch
from sliderquant.kernels.packed_gemv import packed_gemv
from sliderquant.method.packed import PackedLinear, packed_linear
from sliderquant.method.packing import packed_tensors
from sliderquant.method.quantizer import WeightFormat, quantize_weight

device = sys.argv[1]
results = []
# Rows, outputs, inputs and group: whole tiles, several tiles in a row, tiles behind the end of a group,
# groups that begin within a word, no row at all.
CASES = ((1, 20, 96, 32), (2, 7, 100, None), (8, 33, 144, 48), (5, 18, 100, 20), (0, 4, 32, 16))
block_k = 32 if device == "cpu" else None
for bits in map(int, sys.argv[2].split(",")):
    for sym in (True, False):
        for rows, out, columns, group in CASES:
            for dtype in (torch.float32, torch.float16 if device == "cpu" else torch.bfloat16):
                torch.manual_seed(bits)
                fmt = WeightFormat(bits=bits, group_size=group, sym=sym, dtype=dtype)
                weight = quantize_weight(torch.randn(out, columns), fmt)
                made = {k: v.to(device) for k, v in packed_tensors(weight).items()}
                x = torch.randn(rows, columns, device=device).to(dtype)
                args = made["weight_packed"], made["weight_scale"], made.get("weight_zero_point")
                got = packed_gemv(x, *args, bits, block_k=block_k)
                plain = packed_linear(x, *args, None, fmt)
                exact = x.double() @ weight.dequantize().double().to(device).T
                scale = exact.abs().max().item() if rows else 1.0
                errors = [(y.double() - exact).abs().max().item() / scale if rows else 0.0
                          for y in (got, plain)]
                results.append([str(dtype), list(got.shape) == [rows, out], *errors])

torch.manual_seed(0)
linear = torch.nn.Linear(64, 12)
fmt = WeightFormat(bits=4, group_size=16, sym=False, dtype=torch.float32)
layer = PackedLinear(linear, fmt, kernel=True)
state = {**packed_tensors(quantize_weight(linear.weight.detach(), fmt)), "bias": linear.bias}
layer.load_state_dict(state, assign=True)
layer.to(device)
for shape in ((1, 1, 64), (2, 3, 64), (40, 64)):
    x = torch.randn(shape, device=device)
    dense = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-4, atol=1e-5)
x = torch.randn(2, 64, device=device)
arguments = x, layer.weight_packed, layer.weight_scale, layer.weight_zero_point, 4, 16, 32
torch.library.opcheck(torch.ops.sliderquant.packed_gemv.default, arguments)
print(json.dumps(results))
"""


def check(device: str, bits: str, **environment: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, device, bits],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_as_good_as_plain(results, bits: str) -> None:
    assert len(results) == 20 * len(bits.split(","))
    for dtype, shape, error, plain in results:
        assert shape
        # Half a unit in the last place of the result's type is unavoidable.
        floor = {"torch.float32": 5e-7, "torch.float16": 5e-4, "torch.bfloat16": 4e-3}[dtype]
        assert error <= max(2 * plain, floor), (dtype, error, plain)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["2,4,8", "3", "5,6", "7"])
def test_the_kernel_is_as_near_to_float64_as_the_plain_function(bits: str) -> None:
    # In float16 and not bfloat16, which the interpreter cuts off instead of rounding.
    assert_as_good_as_plain(check("cpu", bits, TRITON_INTERPRET="1"), bits)


def test_fake_tensors_see_one_operation_of_a_known_shape(fake_card) -> None:
    fmt = WeightFormat(bits=4, group_size=16, sym=False, dtype=torch.float16)
    layer = PackedLinear(torch.nn.Linear(64, 12, bias=False), fmt, kernel=True)
    y = fake_card.take(layer)(fake_card.tensor(1, 3, 64, dtype=torch.float16))
    assert (y.shape, y.dtype, y.device) == ((1, 3, 12), torch.float16, torch.device("cuda:0"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_is_as_near_to_float64_on_a_gpu() -> None:
    assert_as_good_as_plain(check("cuda", "2,3,4,5,6,7,8"), "2,3,4,5,6,7,8")


def test_the_kernel_takes_as_many_rows_as_it_has_room_for() -> None:
    from sliderquant.kernels.packed_gemv import packed_gemv

    with pytest.raises(ValueError, match="x has 9 rows, the kernel takes 8; use packed_linear"):
        packed_gemv(torch.ones(9, 32), torch.ones(4, 4), torch.ones(4, 1), None, 4)


@pytest.mark.parametrize(
    ("bits", "zero", "loads"),
    # The words of a period, x, the scale; a zero point may begin in one word and end in the next.
    [(4, False, 1 + 2), (4, True, 1 + 2 + 1), (3, True, 3 + 2 + 2)],
)
def test_a_tile_is_read_once_for_all_rows_by_code_that_a_gpu_can_run(
    bits, zero, loads, tmp_path, monkeypatch
) -> None:
    """The compiler needs no GPU: it makes the program of a Hopper card here."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sliderquant.kernels.packed_gemv import _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns about 3.10
    constants = {
        "BITS": bits, "HAS_ZERO": zero, "PERIOD": 32 if bits == 3 else 8, "ALIGN": 128,
        "BLOCK_M": 8, "BLOCK_N": 16, "BLOCK_K": 128,
    }  # fmt: skip
    pointers = {"packed_ptr": "*i32", "zero_ptr": "*i32", "x_ptr": "*bf16", "scale_ptr": "*bf16"}
    pointers["out_ptr"] = "*bf16"
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in _kernel.arg_names
    }
    source = ASTSource(fn=_kernel, signature=signature, constexprs=constants)
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 5})
    assert compiled.asm["ttir"].count("tt.load") == loads
    assert len(compiled.asm["cubin"]) > 1000
