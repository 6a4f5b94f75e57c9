"""The kernels against the references; under Triton's interpreter where there is no GPU.

Run as a script, this file does the comparison: test_column_rounding.py blocks|procedures DEVICE [BITS].
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sliderquant.kernels import column_rounding
from sliderquant.kernels.column_rounding import (
    HAS_TRITON,
    SUB_BLOCK_COLUMNS,
    round_columns,
    round_columns_reference,
    sweep_columns,
    sweep_columns_reference,
)
from sliderquant.method import error_compensation
from sliderquant.method.error_compensation import (
    Grid,
    coordinate_descent_sweep,
    factorize,
    round_with_error_feedback,
)
from sliderquant.method.quantizer import WeightFormat, quantization_grid

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this platform")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernel_round(wanted, scale, zero, factor, code_range, dtype):
    """``round_columns`` by the kernel, on any device."""
    return column_rounding._round_operator(wanted, scale, zero, factor, *code_range, dtype)


def kernel_sweep(codes, slope, scale, zero, hessian, code_range):
    """``sweep_columns`` by the kernel, on any device."""
    return column_rounding._sweep_operator(codes, slope, scale, zero, hessian, *code_range)


def layer(columns: int, rows: int, seed: int):
    """A transposed weight and the damped second moment of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ (mix + torch.eye(columns))
    hessian = x.double().T @ x.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(columns, rows, generator=generator).double(), hessian


def grid_of(weight, fmt: WeightFormat) -> Grid:
    """The grid of a transposed weight, without clipping."""
    group_size = fmt.columns_per_group(len(weight))
    scale, zero = quantization_grid(weight.T.unflatten(-1, (-1, group_size)), fmt)
    return Grid(scale=scale.squeeze(-1).T, zero=zero.squeeze(-1).T, group_size=group_size, fmt=fmt)


# What the script computes.


def compare_blocks(device: str, sizes: list[tuple[int, int]]) -> list[list]:
    """One block at a time: ragged, cut out of larger tensors, with values that are not finite.

    Returns:
        For each size and type its name, how many codes of the kernels differ from those of the
        references, how many errors are off by more than 1e-9 (1e-4 in float32), and how many codes
        the sweep changed.
    """
    results = []
    half = torch.float16 if device == "cpu" else torch.bfloat16
    for columns, rows in sizes:
        weight, hessian = layer(columns + 2, rows + 3, seed=columns)
        fmt = WeightFormat(bits=3, group_size=None, sym=False, dtype=half)
        grid = grid_of(weight, fmt)
        wanted = weight.clone()
        wanted[2, rows // 2] = torch.nan
        wanted[2, 4] = torch.inf
        codes = ((weight / grid.scale).round() + grid.zero).clamp(*fmt.code_range)

        # Views whose rows do not follow each other, and a matrix that is stored by columns.
        factor = torch.linalg.cholesky(hessian.inverse(), upper=True).T.contiguous().T
        d, z = (tensor.expand_as(weight) for tensor in (grid.scale, grid.zero))
        residual = weight - (codes - z) * d
        full = (wanted, codes, hessian @ residual, d, z, factor, hessian)
        for dtype in (torch.float64, torch.float32):
            values = [tensor.to(device, dtype) for tensor in full]
            cut = [tensor[2:, 2:-1] for tensor in values[:5]] + [t[2:, 2:] for t in values[5:]]
            wanted_cut, codes_cut, slope, scale, zero, u, h = cut

            given = wanted_cut, scale, zero, u, fmt.code_range, dtype if rows % 2 else half
            before = wanted_cut.clone()
            ours, reference = kernel_round(*given), round_columns_reference(*given)
            torch.testing.assert_close(wanted_cut, before, rtol=0, atol=0, equal_nan=True)
            differing = unequal(ours[0], reference[0])
            close = 1e-9 if dtype == torch.float64 else 1e-4
            far = unequal(ours[1], reference[1], close)

            given = codes_cut, slope, scale, zero, h, fmt.code_range
            ours, reference = kernel_sweep(*given), sweep_columns_reference(*given)
            differing += unequal(ours, reference)
            case = f"{columns} x {rows}, {dtype}"
            results.append([case, differing, far, unequal(reference, codes_cut)])
    return results


def unequal(first, second, close: float = 0.0) -> int:
    """How many values differ by more than that, absolutely and relatively; NaN is equal to NaN."""
    return int((~torch.isclose(first, second, rtol=close, atol=close, equal_nan=True)).sum())


def check_operators(device: str) -> None:
    """Schema, fake tensors and autograd registration, by PyTorch's own check; and no rows at all."""
    weight, hessian = layer(4, 3, seed=0)
    weight, hessian = weight.to(device), hessian.to(device)
    one, nothing = torch.ones_like(weight), torch.zeros_like(weight)
    operators = torch.ops.sliderquant
    half = torch.float16
    given = weight, one, nothing, hessian, -2, 1, half
    torch.library.opcheck(operators.round_columns.default, given)
    given = nothing, weight, one, nothing, hessian, -2, 1
    torch.library.opcheck(operators.sweep_columns.default, given)
    none = weight[:, :0]
    assert kernel_round(none, none, none, hessian, (0, 3), half)[0].shape == (4, 0)
    assert kernel_sweep(none, none, none, none, hessian, (0, 3)).shape == (4, 0)


def compare_procedures(device: str, bits: int) -> list[list]:
    """All columns of a layer, by kernels and by references, with every kind of group.

    Returns:
        For each case its name, the share of codes that differ, and by how much the squared error of the
        output does, relative to itself.
    """
    columns, rows, block = (128, 20, 28) if device == "cpu" else (384, 70, 100)
    error_compensation.COLUMN_BLOCK = block  # so that the last block is ragged
    half = torch.float16 if device == "cpu" else torch.bfloat16

    results = []
    for number, group_size in enumerate((32, 64, 128, None)):
        weight, hessian = layer(columns, rows, seed=number)
        stored = torch.float32 if number == bits % 4 else half
        sym = number % 2 == bits // 3 % 2  # each kind of group with both, over all bits
        fmt = WeightFormat(bits=bits, group_size=group_size, sym=sym, dtype=stored)
        for dtype in (torch.float64, torch.float32):
            target = weight.to(device, dtype)
            grid = grid_of(target, fmt)
            curvature = factorize(hessian.to(device), dtype)
            ours = codes_by(kernel_round, kernel_sweep, target, grid, curvature)
            references = codes_by(
                round_columns_reference, sweep_columns_reference, target, grid, curvature
            )
            for name, *pair in zip(("round", "sweep"), ours, references, strict=True):
                costs = [squared_error(target, codes, grid, hessian) for codes in pair]
                share = (pair[0] != pair[1]).double().mean().item()
                case = f"{name}, {bits} bits by {group_size}, sym={sym}, {dtype}, {stored}"
                results.append([case, share, abs(costs[0] - costs[1]) / costs[1]])
    return results


def codes_by(round_function, sweep_function, target, grid: Grid, curvature):
    """Codes with error feedback, and nearest codes after a sweep, by functions for a block."""
    error_compensation.round_columns = round_function
    error_compensation.sweep_columns = sweep_function
    scale, zero = grid.of_columns(torch.arange(len(target), device=target.device))
    nearest = ((target / scale).round() + zero).clamp(*grid.fmt.code_range)
    return (
        round_with_error_feedback(target, grid, curvature.order, curvature.inverse_factor()),
        coordinate_descent_sweep(nearest, grid, target, curvature.hessian, curvature.order),
    )


def squared_error(target, codes, grid: Grid, hessian) -> float:
    """tr((W* - W^) H (W* - W^)^T), in float64."""
    residual = (target.double() - grid.values(codes).double()).cpu()
    return float((residual * (hessian @ residual)).sum())


def run_script(*words: str, **environment: str) -> list:
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Tests.


def assert_same_blocks(results: list) -> None:
    """The codes are identical, errors close, and every block of some size is really swept."""
    assert results
    for case, differing, far, swept in results:
        assert differing == far == 0, (case, differing, far)
        assert swept > 0 or int(case.split()[0]) < 8, case


@needs_triton
def test_a_small_block_gets_the_codes_of_the_reference() -> None:
    assert_same_blocks(run_script("blocks", "cpu", "small", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
def test_blocks_of_any_size_get_the_codes_of_the_reference() -> None:
    assert_same_blocks(run_script("blocks", "cpu", "all", TRITON_INTERPRET="1"))


def assert_same_results(results: list, share: float, cost: float) -> None:
    """Identical codes in float64; in float32 a value between two codes may fall to either side."""
    assert len(results) == 16
    for case, differing, change in results:
        assert differing <= (0 if "float64" in case else share), (case, differing)
        assert change <= (0 if "float64" in case else cost), (case, change)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_a_layer_gets_the_codes_of_the_reference(bits: str) -> None:
    # With float16 and not bfloat16, which the interpreter cuts off instead of rounding.
    results = run_script("procedures", "cpu", bits, TRITON_INTERPRET="1")
    assert_same_results(results, share=1e-4, cost=1e-6)


@pytest.mark.cuda
@needs_card
def test_blocks_get_the_codes_of_the_reference_on_a_gpu() -> None:
    assert_same_blocks(run_script("blocks", "cuda", "all"))


@pytest.mark.cuda
@needs_card
@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_a_layer_gets_the_codes_of_the_reference_on_a_gpu(bits: str) -> None:
    # PyTorch does not fuse its sums on a GPU, and a code that falls to the other side changes others.
    assert_same_results(run_script("procedures", "cuda", bits), share=1e-3, cost=1e-3)


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.prim.device.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_triton
def test_a_block_on_a_gpu_is_one_operation(fake_card) -> None:
    block, matrix = fake_card.tensor(128, 640), fake_card.tensor(128, 128)
    with Operations() as operations:
        codes, errors = round_columns(block, block, block, matrix, (0, 15), torch.bfloat16)
        best = sweep_columns(block, block, block, block, matrix, (0, 15))
    wanted = ["sliderquant.round_columns.default", "sliderquant.sweep_columns.default"]
    assert operations.names == wanted
    for result in (codes, errors, best):
        assert (result.shape, result.dtype) == ((128, 640), torch.float32)
        assert result.device == fake_card.device


@needs_triton
def test_a_layer_on_a_gpu_is_one_kernel_a_block_and_no_wait(fake_card) -> None:
    """A wait for a value raises there."""
    fmt = WeightFormat(bits=4, group_size=64, sym=False, dtype=torch.bfloat16)
    weight = fake_card.tensor(320, 96)
    grid = Grid(scale=weight[:5], zero=weight[:5], group_size=64, fmt=fmt)
    curvature = factorize(fake_card.tensor(320, 320, dtype=torch.float64))
    with Operations() as operations:
        codes = round_with_error_feedback(weight, grid, curvature.order, curvature.inverse_factor())
        hessian = curvature.hessian.to(codes.dtype)
        coordinate_descent_sweep(codes, grid, weight, hessian, curvature.order)
    for name in ("round_columns", "sweep_columns"):
        assert operations.names.count(f"sliderquant.{name}.default") == 3


def test_without_triton_a_gpu_uses_the_references(fake_card, monkeypatch) -> None:
    monkeypatch.setattr(column_rounding, "HAS_TRITON", False)
    block, matrix = fake_card.tensor(5, 7), fake_card.tensor(5, 5)
    codes, errors = round_columns(block, block, block, matrix, (0, 15), torch.bfloat16)
    best = sweep_columns(block, block, block, block, matrix, (0, 15))
    assert codes.device == errors.device == best.device == fake_card.device


def test_the_module_works_where_there_is_no_triton() -> None:
    code = """
import sys
import torch
sys.modules["triton"] = None  # what a failed import leaves behind
from sliderquant.kernels.column_rounding import round_columns
x = torch.tensor([[0.2, 0.6], [1.4, -3.0]])
one, zero = torch.ones(2, 2), torch.zeros(2, 2)
codes, _ = round_columns(x, one, zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), (-2, 1), torch.float32)
# The second column loses half of 0.2 - 0 and of 0.6 - 1.
assert codes.tolist() == [[0.0, 1.0], [1.0, -2.0]], codes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("_round_kernel", "fp32"),
        ("_sweep_kernel", "fp32"),
        pytest.param("_round_kernel", "fp64", marks=pytest.mark.slow),
        pytest.param("_sweep_kernel", "fp64", marks=pytest.mark.slow),
    ],
)
def test_a_column_stays_in_registers(kernel, dtype, tmp_path, monkeypatch) -> None:
    """The compiler needs no GPU: it makes the program of a Hopper card here."""
    import triton.language as tl
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(column_rounding, kernel)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"STORED": tl.bfloat16, "ROWS": 32, "COUNT": SUB_BLOCK_COLUMNS}
    constants = {name: constants[name] for name in constants if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name.endswith("_ptr") else "i32"
        for name in function.arg_names
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    # What does not fit into the 255 registers of a thread would be kept in memory.
    program = tmp_path / "kernel.cubin"
    program.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(program)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in usage
    assert "LOCAL:0" in usage


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, option = sys.argv[1:]
    found = []
    if what == "blocks":
        sizes = [(11, 20)]
        found = compare_blocks(
            where, sizes if option == "small" else [*sizes, (1, 5), (45, 41), (128, 20)]
        )
        if option == "all":
            check_operators(where)
    else:
        found = compare_procedures(where, int(option))
    print(json.dumps(found))
