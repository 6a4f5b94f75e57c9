"""The inner loops of compensated rounding: a block of columns for all rows, one column after the other.

Tensors are transposed weights, [columns, rows], so that a column of the weight is contiguous in memory.
Rows do not depend on each other. What the columns of a block pass on to each other is done here; what
they pass on to the columns behind the block is one matrix product of the caller. Symbols: D scale,
z zero point, q code, U upper Cholesky factor of H^-1, H damped second moment of the inputs.

On a CUDA device one Triton kernel takes the place of about ten for each column. A thread has one row and
holds a sub-block of its columns in registers. Before a sub-block begins, it takes over what all columns
in front of it pass on; then its own columns pass on what they lack one by one. So every value goes
through the operations of the reference in the same order. Divisions are exact, and products are fused
with the sum that they belong to where PyTorch does so on the CPU: in what columns pass on, only there.
"""

# Triton knows how to add tuples, not how to unpack them.
# ruff: noqa: RUF005
# Triton's compile-time constants are integers in a kernel, and a type of their own to a type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # Not every platform has it.

# A warp of 32 threads is a program: the loop over columns is one long chain of dependent steps, which
# more warps would not shorten, and small programs spread over more of the processors.
ROWS_PER_PROGRAM = 32
WARPS_PER_PROGRAM = 1
# A thread holds four values for each column of a sub-block. 8 columns need 72 registers in float32 and
# about 130 in float64, of 255. With 16 the kernels take five times as long to compile, and float64
# hardly fits. Errors in front of a sub-block are read again for each, a ninth of a thread's reads.
SUB_BLOCK_COLUMNS = 8


def round_columns(
    wanted: Float[Tensor, "b rows"],
    scale: Float[Tensor, "b rows"],
    zero: Float[Tensor, "b rows"],
    factor: Float[Tensor, "b b"],
    code_range: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b rows"], Float[Tensor, "b rows"]]:
    """Round columns in turn; those behind take over the errors, as in GPTQ.

    Args:
        wanted: The columns, with the errors of all blocks before; float32 or float64, not changed.
        scale: D of every weight.
        zero: z of every weight, a whole number.
        factor: Rows and columns of U that belong to the block.
        code_range: Smallest and largest code.
        dtype: Type in which (q - z) D is stored.

    Returns:
        q, and the errors e = (wanted - (q - z) D) / U_jj that the columns behind the block take over.
    """
    if HAS_TRITON and wanted.is_cuda:
        return _round_operator(wanted, scale, zero, factor, *code_range, dtype)
    return round_columns_reference(wanted, scale, zero, factor, code_range, dtype)


def sweep_columns(
    codes: Float[Tensor, "b rows"],
    slope: Float[Tensor, "b rows"],
    scale: Float[Tensor, "b rows"],
    zero: Float[Tensor, "b rows"],
    hessian: Float[Tensor, "b b"],
    code_range: tuple[int, int],
) -> Float[Tensor, "b rows"]:
    """Give columns their best codes in turn, all others held: coordinate descent, as in QuantEase.

    Args:
        codes: q so far; float32 or float64, not changed.
        slope: ((W* - W^) H) of these columns; not changed.
        scale: D of every weight.
        zero: z of every weight, a whole number.
        hessian: Rows and columns of H that belong to the block.
        code_range: Smallest and largest code.
    """
    if HAS_TRITON and codes.is_cuda:
        return _sweep_operator(codes, slope, scale, zero, hessian, *code_range)
    return sweep_columns_reference(codes, slope, scale, zero, hessian, code_range)


def round_columns_reference(
    wanted: Float[Tensor, "b rows"],
    scale: Float[Tensor, "b rows"],
    zero: Float[Tensor, "b rows"],
    factor: Float[Tensor, "b b"],
    code_range: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b rows"], Float[Tensor, "b rows"]]:
    """Compute ``round_columns`` by operations of PyTorch, on any device."""
    remaining = wanted.clone()
    codes, errors = torch.empty_like(remaining), torch.empty_like(remaining)

    # All views at once, and results written in place: a column is short, and calls cost more than work.
    passed_on = factor.unsqueeze(-1).unbind()
    tensors = (remaining, scale, zero, codes, errors, factor.diagonal())
    columns = zip(*(tensor.unbind() for tensor in tensors), strict=True)
    for j, (w, d, z, code, error, pivot) in enumerate(columns):
        # The nearest code, and what the stored weight lacks.
        torch.div(w, d, out=code).round_().add_(z).clamp_(*code_range)
        value = torch.sub(code, z, out=error).mul_(d).to(dtype)
        torch.sub(w, value, out=error).div_(pivot)

        # Propagate the error to the later columns of the block.
        remaining[j + 1 :].addcmul_(passed_on[j][j + 1 :], error, value=-1)
    return codes, errors


def sweep_columns_reference(
    codes: Float[Tensor, "b rows"],
    slope: Float[Tensor, "b rows"],
    scale: Float[Tensor, "b rows"],
    zero: Float[Tensor, "b rows"],
    hessian: Float[Tensor, "b b"],
    code_range: tuple[int, int],
) -> Float[Tensor, "b rows"]:
    """Compute ``sweep_columns`` by operations of PyTorch, on any device."""
    slope, best = slope.clone(), torch.empty_like(codes)
    optimum, change = torch.empty_like(codes[0]), torch.empty_like(codes[0])

    passed_on = hessian.unsqueeze(-1).unbind()
    tensors = (codes, slope, scale, zero, best, hessian.diagonal())
    columns = zip(*(tensor.unbind() for tensor in tensors), strict=True)
    for j, (old, gradient, d, z, new, curvature) in enumerate(columns):
        # The minimum of a parabola, on the grid.
        torch.div(gradient, curvature, out=optimum)
        torch.sub(old, z, out=new).mul_(d).add_(optimum)
        new.div_(d).round_().add_(z).clamp_(*code_range)

        # The slope of the later columns of the block changes with it.
        torch.sub(new, old, out=change).mul_(d)
        slope[j + 1 :].addcmul_(passed_on[j][j + 1 :], change, value=-1)
    return best


if HAS_TRITON:
    import triton
    import triton.language as tl

    # Sizes differ from layer to layer; the kernel is the same.
    _SIZES = ("columns", "rows", "stride", "low", "high")

    @triton.jit
    def _divide(numerator, denominator):  # noqa: ANN001, ANN202
        """Return the quotient, rounded to nearest; the plain one is an approximation in float32."""
        if numerator.dtype == tl.float64:
            quotient = numerator / denominator
        else:
            quotient = tl.div_rn(numerator, denominator)
        return quotient

    @triton.jit
    def _nearest_code(value, scale, zero, low, high):  # noqa: ANN001, ANN202
        """Return the code whose weight is nearest to a value. NaN stays NaN, as in the references."""
        # What is farther out than any code is clamped below in any case.
        level = _divide(value, scale)
        level = tl.where(level > 1048576.0, 1048576.0, level)
        level = tl.where(level < -1048576.0, -1048576.0, level)

        # Half to even: 1.5 * 2^52 in float64 and 1.5 * 2^23 in float32 leave no bits for a fraction.
        if level.dtype == tl.float64:
            level = (level + 6755399441055744.0) - 6755399441055744.0
        else:
            level = (level + 12582912.0) - 12582912.0

        code = level + zero
        code = tl.where(code > high, high, code)
        return tl.where(code < low, low, code)

    @triton.jit
    def _load_columns(tensor_ptr, begin, columns, rows, row, other, COUNT: tl.constexpr):  # noqa: ANN001, ANN202
        """Return columns from ``begin`` on, each a tensor of this program's rows."""
        loaded = ()
        for k in tl.static_range(COUNT):
            exists = row < tl.where(begin + k < columns, rows, 0)
            column = tl.load(tensor_ptr + (begin + k) * rows + row, mask=exists, other=other)
            loaded = loaded + (column,)
        return loaded

    @triton.jit
    def _store_columns(tensor_ptr, values, begin, columns, rows, row, COUNT: tl.constexpr):  # noqa: ANN001, ANN202
        """Write columns from ``begin`` on."""
        for k in tl.static_range(COUNT):
            exists = row < tl.where(begin + k < columns, rows, 0)
            tl.store(tensor_ptr + (begin + k) * rows + row, values[k], mask=exists)

    @triton.jit
    def _load_entries(entry_ptr, COUNT: tl.constexpr):  # noqa: ANN001, ANN202
        """Return neighbouring entries of a row of a matrix, each a number."""
        entries = ()
        for k in tl.static_range(COUNT):
            entries = entries + (tl.load(entry_ptr + k),)
        return entries

    @triton.jit
    def _minus_products(values, entries, passed_on, COUNT: tl.constexpr):  # noqa: ANN001, ANN202
        """Return the last ``COUNT`` columns less their entries times what a column passes on."""
        first: tl.constexpr = len(values) - COUNT
        updated = ()
        for k in tl.static_range(first, first + COUNT):
            updated = updated + (tl.fma(entries[k], -passed_on, values[k]),)
        return updated

    @triton.jit
    def _minus_earlier_columns(  # noqa: ANN202
        values, matrix_ptr, stride, passed_on_ptr, begin, rows, row, COUNT: tl.constexpr,  # noqa: ANN001
    ):  # fmt: skip
        """Return columns from ``begin`` on less what all columns in front of them pass on."""
        for start in range(0, begin, COUNT):
            for i in tl.static_range(COUNT):
                address = passed_on_ptr + (start + i) * rows + row
                passed_on = tl.load(address, mask=row < rows, other=0.0)
                entries = _load_entries(matrix_ptr + (start + i) * stride + begin, COUNT)
                values = _minus_products(values, entries, passed_on, COUNT)
        return values

    @triton.jit(do_not_specialize=_SIZES)
    def _round_kernel(  # noqa: ANN202
        wanted_ptr, scale_ptr, zero_ptr, factor_ptr, codes_ptr, errors_ptr,  # noqa: ANN001
        columns, rows, stride, low, high,  # noqa: ANN001
        STORED: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)

        for begin in range(0, columns, COUNT):
            # A sub-block. The barrier makes the errors visible that were stored before.
            scale = _load_columns(scale_ptr, begin, columns, rows, row, 1.0, COUNT)
            zero = _load_columns(zero_ptr, begin, columns, rows, row, 0.0, COUNT)
            wanted = _load_columns(wanted_ptr, begin, columns, rows, row, 0.0, COUNT)
            tl.debug_barrier()
            remaining = _minus_earlier_columns(
                wanted, factor_ptr, stride, errors_ptr, begin, rows, row, COUNT
            )

            codes, errors = (), ()
            for j in tl.static_range(COUNT):
                # The nearest code, and what the stored weight lacks.
                entries = _load_entries(factor_ptr + (begin + j) * (stride + 1), COUNT - j)
                code = _nearest_code(remaining[0], scale[j], zero[j], low, high)
                value = (code - zero[j]) * scale[j]
                if value.dtype != STORED:
                    value = value.to(tl.float32).to(STORED).to(value.dtype)
                error = _divide(remaining[0] - value, entries[0])
                codes, errors = codes + (code,), errors + (error,)

                # Propagate the error to the later columns of the sub-block.
                remaining = _minus_products(remaining, entries, error, COUNT - j - 1)

            _store_columns(codes_ptr, codes, begin, columns, rows, row, COUNT)
            _store_columns(errors_ptr, errors, begin, columns, rows, row, COUNT)

    @triton.jit(do_not_specialize=_SIZES)
    def _sweep_kernel(  # noqa: ANN202
        codes_ptr, slope_ptr, scale_ptr, zero_ptr, hessian_ptr, best_ptr, changes_ptr,  # noqa: ANN001
        columns, rows, stride, low, high,  # noqa: ANN001
        ROWS: tl.constexpr, COUNT: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)

        for begin in range(0, columns, COUNT):
            # A sub-block. The barrier makes the changes visible that were stored before.
            codes = _load_columns(codes_ptr, begin, columns, rows, row, 0.0, COUNT)
            scale = _load_columns(scale_ptr, begin, columns, rows, row, 1.0, COUNT)
            zero = _load_columns(zero_ptr, begin, columns, rows, row, 0.0, COUNT)
            slope = _load_columns(slope_ptr, begin, columns, rows, row, 0.0, COUNT)
            tl.debug_barrier()
            slope = _minus_earlier_columns(
                slope, hessian_ptr, stride, changes_ptr, begin, rows, row, COUNT
            )

            best, changes = (), ()
            for j in tl.static_range(COUNT):
                # The minimum of a parabola, on the grid.
                entries = _load_entries(hessian_ptr + (begin + j) * (stride + 1), COUNT - j)
                optimum = (codes[j] - zero[j]) * scale[j] + _divide(slope[0], entries[0])
                code = _nearest_code(optimum, scale[j], zero[j], low, high)
                change = (code - codes[j]) * scale[j]
                best, changes = best + (code,), changes + (change,)

                # The slope of the later columns of the sub-block changes with it.
                slope = _minus_products(slope, entries, change, COUNT - j - 1)

            _store_columns(best_ptr, best, begin, columns, rows, row, COUNT)
            _store_columns(changes_ptr, changes, begin, columns, rows, row, COUNT)


@torch.library.custom_op("sliderquant::round_columns", mutates_args=())
def _round_operator(
    wanted: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    codes, errors = wanted.new_empty(wanted.shape), wanted.new_empty(wanted.shape)
    inputs = [tensor.contiguous() for tensor in (wanted, scale, zero)]
    stored = getattr(tl, str(dtype).removeprefix("torch."))
    _launch(_round_kernel, inputs, factor, [codes, errors], (low, high), STORED=stored)
    return codes, errors


@torch.library.custom_op("sliderquant::sweep_columns", mutates_args=())
def _sweep_operator(
    codes: Tensor,
    slope: Tensor,
    scale: Tensor,
    zero: Tensor,
    hessian: Tensor,
    low: int,
    high: int,
) -> Tensor:
    best, changes = codes.new_empty(codes.shape), codes.new_empty(codes.shape)
    inputs = [tensor.contiguous() for tensor in (codes, slope, scale, zero)]
    _launch(_sweep_kernel, inputs, hessian, [best, changes], (low, high))
    return best


@_round_operator.register_fake
def _shapes_of_rounded(
    wanted: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: Tensor,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return wanted.new_empty(wanted.shape), wanted.new_empty(wanted.shape)


@_sweep_operator.register_fake
def _shape_of_swept(
    codes: Tensor,
    slope: Tensor,
    scale: Tensor,
    zero: Tensor,
    hessian: Tensor,
    low: int,
    high: int,
) -> Tensor:
    return codes.new_empty(codes.shape)


def _launch(
    kernel: Any,
    inputs: Sequence[Tensor],
    matrix: Float[Tensor, "b b"],
    outputs: Sequence[Tensor],
    code_range: tuple[int, int],
    **constants: Any,
) -> None:
    """Run a kernel over all rows; ``inputs`` and ``outputs`` are contiguous and of one type."""
    columns, rows = outputs[0].shape
    if outputs[0].numel() == 0:
        return

    # A kernel reads whole sub-blocks of the matrix. What comes of the last columns then is not stored.
    padding = -columns % SUB_BLOCK_COLUMNS
    if padding:
        matrix = F.pad(matrix, (0, padding, 0, padding), value=1.0)
    elif matrix.stride(1) != 1:
        matrix = matrix.contiguous()

    # Triton launches on the current card, which need not be that of the tensors.
    with torch.cuda.device_of(outputs[0]):
        kernel[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
            *inputs, matrix, *outputs, columns, rows, matrix.stride(0), *code_range,
            ROWS=ROWS_PER_PROGRAM, COUNT=SUB_BLOCK_COLUMNS, **constants,
            num_warps=WARPS_PER_PROGRAM, enable_fp_fusion=False,
        )  # fmt: skip
