"""Closed-form rounding in which later columns and later layers make up for earlier rounding errors.

This method is not from the SliderQuant paper; it needs neither windows nor gradients. The linear layers
of a block are solved in the order in which the block computes them, those that read the same input
together, each for the inputs that it receives in the quantized model. Symbols: W [out, in] is the
weight, X [n, in] those inputs, E [n, out] what the layer's output lacks to equal the full-precision
model's, d the damping.

1. ``moments.collect_moments`` runs both models over the samples and sums X^T X and X^T E.
2. ``factorize`` gives H = X^T X + d mean(diag(X^T X)) I.
3. ``ridge_update`` gives (H^-1 X^T E)^T, the ridge regression that makes up for the errors of all layers
   before. The target is the output that the layer would have in the full-precision model, as in GPTAQ
   (arXiv 2504.02692). A layer that writes to the residual stream also corrects the error that the
   stream already carries. ``HeldOutScore`` says how much of the update holds on samples that it was
   not fitted to: W* = W + strength * update.
4. ``round_with_error_feedback`` rounds the columns of W* one after the other, the most active input
   first. The columns behind take over what a column lacks, as in GPTQ (arXiv 2210.17323). It does so on
   two grids, one that covers the whole range of each group and one that ``search_grid`` narrows to what
   nearest rounding errs least with; each row keeps the one with the smaller error of its output.
5. ``refit_scales`` and ``coordinate_descent_sweep`` take turns in lowering the squared error of the
   output, tr((W* - W^) H (W* - W^)^T): the scales of a row by least squares, the codes one column at a
   time, as in QuantEase (arXiv 2309.01885). Weights that are stored too coarsely for that skip it.

Where activations are rounded too, X is what the layer multiplies with, after rounding. Channels are
scaled first (see ``smoothing``), and W and X are those of the scaled model.

Weights are transposed here, [in, out]: a column of the weight is contiguous, and layers that read the
same input stand side by side. H is factorised once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.kernels.column_rounding import round_columns, sweep_columns
from sliderquant.method.moments import GroupMoments
from sliderquant.method.parallel import gather_columns, own_columns
from sliderquant.method.quantizer import (
    QuantizedWeight,
    WeightFormat,
    nearest_codes,
    quantization_grid,
    simulate_scale,
    simulate_storage,
)
from sliderquant.method.ridge import Curvature, factorize, ridge_update

REFINEMENT_PASSES = 2  # times that scales and codes are improved in turn (step 5)
COARSE_STORAGE = 0.5  # steps of the grid between neighbours of the stored type where it is left out
COLUMN_BLOCK = 128  # columns whose errors reach all columns behind them in one matrix product
SMALLEST_RANGE = 0.4  # least share of a group's range that its grid may cover
RANGE_STEPS = 13  # ranges that are tried, up to the whole


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """Scales and zero points of transposed weights.

    Attributes:
        scale: D of every group of every row of the weights.
        zero: z of every group.
        group_size: Input columns per group.
        fmt: Storage format.
    """

    scale: Float[Tensor, "groups out"]
    zero: Float[Tensor, "groups out"]
    group_size: int
    fmt: WeightFormat

    def of_columns(self, columns: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """Return D and z of every weight in some input columns, [b, out] each."""
        group = columns // self.group_size
        return self.scale[group], self.zero[group]

    def levels(self, codes: Float[Tensor, "in out"]) -> Float[Tensor, "groups g out"]:
        """Return q - z by group."""
        return codes.unflatten(0, (-1, self.group_size)) - self.zero.unsqueeze(1)

    def values(self, codes: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
        """Return (q - z) D."""
        return (self.levels(codes) * self.scale.unsqueeze(1)).flatten(0, 1)


def corrected_weight(moments: GroupMoments) -> tuple[Float[Tensor, "in own"], Curvature]:
    """Return W* of all layers of a group side by side, transposed, and H: steps 2 and 3 of the method.

    Layers make up for the errors of the layers before, as far as that holds on samples kept apart.
    Several processes share the rows of the weights, which are columns here: this one's are returned.
    """
    own = own_columns(len(moments.weight))
    weight = moments.weight[own]
    curvature = factorize(moments.second, weight.dtype)
    if moments.through_weight:
        update = ridge_update(curvature, moments.cross) @ weight.T
    else:
        update = curvature.solve(moments.cross[:, own]).to(weight.dtype)
    return weight.T + moments.strength.to(weight.dtype) * update, curvature


def round_layers(
    target: Float[Tensor, "in own"],
    curvature: Curvature,
    outputs: Sequence[int],
    fmt: WeightFormat,
) -> list[QuantizedWeight]:
    """Return layers that read the same input, rounded for it: steps 4 and 5 of the method.

    Args:
        target: This process's part of W* of all layers side by side.
        curvature: H of their input.
        outputs: Rows of each layer's weight.
        fmt: Storage format; its group size divides ``in``.
    """
    # Each process rounds some rows; all of them get the result.
    codes, grid = round_and_refine(target.contiguous(), fmt, curvature)
    (low, _), rows = fmt.code_range, sum(outputs)
    codes = gather_columns((codes - low).to(torch.uint8), rows).to(torch.int16) + low
    scale = gather_columns(grid.scale, rows)
    zero = gather_columns(grid.zero, rows)

    # Layer by layer, as they are stored.
    outputs = list(outputs)
    parts = zip(
        codes.split(outputs, 1), scale.split(outputs, 1), zero.split(outputs, 1), strict=True
    )
    return [
        QuantizedWeight(
            codes=codes_of_layer.T.contiguous(),
            scale=scale_of_layer.T.contiguous().to(fmt.scale_dtype),
            zero=None if fmt.sym else zero_of_layer.T.contiguous().to(torch.int16),
            fmt=fmt,
        )
        for codes_of_layer, scale_of_layer, zero_of_layer in parts
    ]


def round_and_refine(
    target: Float[Tensor, "in out"], fmt: WeightFormat, curvature: Curvature
) -> tuple[Float[Tensor, "in out"], Grid]:
    """Return codes and grid of W*: error feedback, then scales and codes improved in turn."""
    codes, grid = round_in_better_range(target, fmt, curvature)

    # Scales that fit the codes, codes that fit the scales.
    for _ in range(REFINEMENT_PASSES if resolves_codes(fmt) else 0):
        scale = refit_scales(codes, grid, target, curvature.hessian)
        grid = replace(grid, scale=simulate_scale(scale, grid.fmt))
        codes = coordinate_descent_sweep(codes, grid, target, curvature.hessian, curvature.order)
    return codes, grid


def resolves_codes(fmt: WeightFormat) -> bool:
    """Whether the type of the stored weights tells neighbouring codes well apart.

    The refinement computes with (q - z) D unrounded; error feedback knows what is stored. bfloat16 keeps
    8 binary digits: with 6 bits or more, where inputs are strongly correlated, refined weights are worse
    than before once they are stored.
    """
    return torch.finfo(fmt.dtype).eps * 2**fmt.bits < COARSE_STORAGE


def round_in_better_range(
    target: Float[Tensor, "in out"], fmt: WeightFormat, curvature: Curvature
) -> tuple[Float[Tensor, "in out"], Grid]:
    """Return codes and grid of W* with error feedback; each row has the better of two ranges.

    A range that nearest rounding would choose leaves columns no room for the errors that they take over.
    How much that costs differs from model to model and from row to row, so both are tried.
    """
    narrow, whole = search_grid(target, fmt), whole_range_grid(target, fmt)
    factor = curvature.inverse_factor()
    codes_narrow = round_with_error_feedback(target, narrow, curvature.order, factor)
    codes_whole = round_with_error_feedback(target, whole, curvature.order, factor)

    error_narrow = output_error(codes_narrow, narrow, target, curvature.hessian)
    error_whole = output_error(codes_whole, whole, target, curvature.hessian)
    is_whole = error_whole < error_narrow
    grid = replace(
        narrow,
        scale=torch.where(is_whole, whole.scale, narrow.scale),
        zero=torch.where(is_whole, whole.zero, narrow.zero),
    )
    return torch.where(is_whole, codes_whole, codes_narrow), grid


def output_error(
    codes: Float[Tensor, "in out"],
    grid: Grid,
    target: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, " out"]:
    """Return (t - D c) H (t - D c)^T of every row t of W*, c = q - z, D c as it is stored."""
    lacking = target - simulate_storage(grid.values(codes), grid.fmt.dtype)
    return (lacking * (hessian @ lacking)).sum(dim=0)


def whole_range_grid(target: Float[Tensor, "in out"], fmt: WeightFormat) -> Grid:
    """Return the grid that reaches the largest and the smallest weight of each group."""
    group_size = fmt.columns_per_group(len(target))
    scale, zero = quantization_grid(target.unflatten(0, (-1, group_size)).mT, fmt)
    return Grid(scale=scale.squeeze(-1), zero=zero.squeeze(-1), group_size=group_size, fmt=fmt)


def search_grid(target: Float[Tensor, "in out"], fmt: WeightFormat) -> Grid:
    """Return the grid of each group with the least squared error of nearest rounding.

    The range is that of W* times a factor from ``SMALLEST_RANGE`` to 1: with few bits, finer levels for
    most weights are worth more than reaching the few largest ones.
    """
    group_size = fmt.columns_per_group(len(target))
    groups = target.unflatten(0, (-1, group_size)).mT  # [groups, out, g]
    best_scale, best_zero = quantization_grid(groups, fmt)
    best_error = torch.full_like(best_scale, torch.inf)
    for step in range(RANGE_STEPS):
        factor = SMALLEST_RANGE + (1 - SMALLEST_RANGE) * step / (RANGE_STEPS - 1)
        # The same share of both ends, so that the zero point stays where it is.
        scale, zero = quantization_grid(groups * factor, fmt)
        error = (nearest_codes(groups, scale, zero, fmt) - zero).mul_(scale).sub_(groups)
        error = error.square_().sum(dim=-1, keepdim=True)

        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return Grid(
        scale=best_scale.squeeze(-1), zero=best_zero.squeeze(-1), group_size=group_size, fmt=fmt
    )


def round_with_error_feedback(
    target: Float[Tensor, "in out"],
    grid: Grid,
    order: Int[Tensor, " in"],
    factor: Float[Tensor, "in in"],
) -> Float[Tensor, "in out"]:
    """Return the codes of W*, rounded column by column with error feedback (GPTQ).

    With U the upper Cholesky factor of H^-1 and e_j the error of column j over U_jj, each later column k
    loses e_j U_jk. Columns are taken in the order of falling diag(H).

    Args:
        target: W*, transposed.
        grid: D and z of every group.
        order: Columns in the order of rounding.
        factor: U, see ``Curvature.inverse_factor``.
    """
    # The codes come back in the order of the columns of the weight.
    remaining, codes = target[order], torch.empty_like(target)
    for begin in range(0, len(order), COLUMN_BLOCK):
        block = slice(begin, min(begin + COLUMN_BLOCK, len(order)))
        columns = order[block]
        scale, zero = grid.of_columns(columns)
        codes[columns], errors = round_columns(
            remaining[block],
            scale,
            zero,
            factor[block, block],
            grid.fmt.code_range,
            grid.fmt.dtype,
        )

        # The columns behind the block get the errors of the whole block in one product.
        remaining[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return codes


def refit_scales(
    codes: Float[Tensor, "in out"],
    grid: Grid,
    target: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "groups out"]:
    """Return scales D of each row that lower (t - D c) H (t - D c)^T, with the levels c held.

    This is one step of steepest descent for the least squares of a row's scales, preconditioned with
    what each group contributes alone, as far as lowers the error most. It solves a row with one scale.
    The normal equations themselves would need ``groups`` copies of the weight.

    Args:
        codes: q, of which c = q - z.
        grid: D so far, kept where the new one is not within a factor of two.
        target: W*, of which t is a row of the weight.
        hessian: H.
    """
    levels = grid.levels(codes)
    own = hessian.unflatten(0, (len(levels), -1)).unflatten(-1, (len(levels), -1))
    curvature = (levels * (own.diagonal(dim1=0, dim2=2).movedim(-1, 0) @ levels)).sum(dim=1)

    # Half the negative gradient of the squared error with respect to W^, and with respect to D.
    slope = hessian @ (target - grid.values(codes))
    downhill = (levels * slope.view_as(levels)).sum(dim=1)
    direction = _divide(downhill, curvature)

    # As far along the direction as lowers the error most.
    change = (levels * direction.unsqueeze(1)).flatten(0, 1)
    bend = (change * (hessian @ change)).sum(dim=0)
    scale = grid.scale + _divide((direction * downhill).sum(dim=0), bend) * direction

    # A scale that changes more than that belongs to codes that are far from the best ones.
    return torch.where((scale > grid.scale / 2) & (scale < grid.scale * 2), scale, grid.scale)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return a quotient; 0 where the denominator is not positive, as for levels that are all zero."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def coordinate_descent_sweep(
    codes: Float[Tensor, "in out"],
    grid: Grid,
    target: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
    order: Int[Tensor, " in"],
) -> Float[Tensor, "in out"]:
    """Return codes after one sweep over the columns, each code the best one with all others held.

    Args:
        codes: Codes so far.
        grid: D and z of every group.
        target: W*.
        hessian: H, in the type of ``target``.
        order: Columns in the order of the sweep.
    """
    # The gradient of the squared error, negative and halved; kept up to date for the columns to come.
    slope = (hessian @ (target - grid.values(codes)))[order]
    hessian = hessian[order.unsqueeze(1), order]

    codes = codes.clone()
    for begin in range(0, len(order), COLUMN_BLOCK):
        block = slice(begin, min(begin + COLUMN_BLOCK, len(order)))
        columns = order[block]
        scale, zero = grid.of_columns(columns)
        before = codes[columns]
        curvature = hessian[block, block]
        best = sweep_columns(before, slope[block], scale, zero, curvature, grid.fmt.code_range)
        codes[columns] = best

        # The columns behind the block get the changes of the whole block in one product.
        change = (best - before) * scale
        slope[block.stop :].addmm_(hessian[block, block.stop :].T, change, alpha=-1)
    return codes
