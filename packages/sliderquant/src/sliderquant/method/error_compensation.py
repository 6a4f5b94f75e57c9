"""Closed-form rounding in which later columns and later layers make up for earlier rounding errors.

This method is not from the SliderQuant paper; it needs neither windows nor gradients. The linear layers
of a block are solved in the order in which the block computes them, those that read the same input
together, each for the inputs that it receives in the quantized model. Symbols: W [out, in] is the
weight, X [n, in] those inputs, E [n, out] what the layer's output lacks to equal the full-precision
model's, d the damping.

1. ``moments.collect_moments`` runs both models over the samples and sums X^T X and X^T E.
2. ``damp_`` gives H = X^T X + d mean(diag(X^T X)) I.
3. ``ridge_update`` gives (H^-1 X^T E)^T, the ridge regression that makes up for the errors of all layers
   before. The target is the output that the layer would have in the full-precision model, as in GPTAQ
   (arXiv 2504.02692). A layer that writes to the residual stream also corrects the error that the
   stream already carries. ``held_out_strength`` says how much of the update holds on samples that it
   was not fitted to: W* = W + strength * update.
4. ``search_grid`` gives each group of W* the range in which nearest rounding errs least, and
   ``round_with_error_feedback`` rounds the columns of W* one after the other, the most active
   input first. The columns behind take over what a column lacks, as in GPTQ (arXiv 2210.17323).
5. ``refit_scales`` and ``coordinate_descent_sweep`` take turns in lowering the squared error of the
   output, tr((W* - W^) H (W* - W^)^T): the scales of a row by least squares, the codes one column at a
   time, as in QuantEase (arXiv 2309.01885).

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
from sliderquant.method.moments import GroupMoments, InputMoments
from sliderquant.method.parallel import gather_columns, own_columns
from sliderquant.method.quantizer import (
    QuantizedWeight,
    WeightFormat,
    nearest_codes,
    quantization_grid,
    simulate_storage,
)

DAMPING = 0.01  # d, the share of the mean diagonal that is added to X^T X, as in GPTQ
REFINEMENT_PASSES = 3  # times that scales and codes are improved in turn (step 5)
COLUMN_BLOCK = 128  # columns whose errors reach all columns behind them in one matrix product
SMALLEST_RANGE = 0.4  # least share of a group's range that its grid may cover
RANGE_STEPS = 13  # ranges that are tried, up to the whole
SCALE_STEPS = 2  # steps of conjugate gradients for the scales, each time


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curvature:
    """H of one input, factorised once for every weight that reads it.

    Attributes:
        hessian: H, float64, columns in their own order.
        order: Columns in the order in which they are rounded: falling diag(H).
        cholesky: Lower Cholesky factor L of H with rows and columns in the reverse of that order.
    """

    hessian: Float[Tensor, "in in"]
    order: Int[Tensor, " in"]
    cholesky: Float[Tensor, "in in"]

    def solve(self, right: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
        """Return H^-1 times a matrix."""
        reverse = self.order.flip(0)
        result = torch.empty_like(right)
        result[reverse] = torch.cholesky_solve(right[reverse], self.cholesky)
        return result

    def inverse_factor(self, dtype: torch.dtype) -> Float[Tensor, "in in"]:
        """Return U in a type, upper, with U^T U the inverse of H in the order of rounding.

        With J the reversal of rows, J H J = L L^T makes U = J L^-1 J.
        """
        identity = torch.eye(
            len(self.order), dtype=self.cholesky.dtype, device=self.cholesky.device
        )
        inverse = torch.linalg.solve_triangular(self.cholesky, identity, upper=False)
        return inverse.to(dtype).flip(0, 1)


def round_layers(
    moments: GroupMoments, outputs: Sequence[int], fmt: WeightFormat
) -> tuple[list[QuantizedWeight], Float[Tensor, ""]]:
    """Return layers that read the same input rounded for it, and the strength of their ridge update.

    These are steps 2 to 5 of the method. Several processes share the rows of the weights.

    Args:
        moments: Of the layers' input, with their weights; used up.
        outputs: Rows of each layer's weight.
        fmt: Storage format; its group size divides ``in``.
    """
    # Make up for the errors of the layers before, as far as that holds on samples kept apart.
    weight = moments.weight
    strength = update_strength(moments)
    everything = moments.merge_()
    curvature = factorize(damp_(everything.second))
    update = ridge_update(curvature, everything.cross).to(weight.dtype)
    update = update @ weight.T if moments.through_weight else update
    target = weight.T + strength.to(weight.dtype) * update

    # Each process rounds some rows; all of them get the result.
    rows = own_columns(len(weight))
    codes, grid = round_and_refine(target[:, rows].contiguous(), fmt, curvature)
    low, _ = fmt.code_range
    codes = gather_columns((codes - low).to(torch.uint8), len(weight)).to(torch.int16) + low
    scale = gather_columns(grid.scale, len(weight))
    zero = gather_columns(grid.zero, len(weight))

    # Layer by layer, as they are stored.
    outputs = list(outputs)
    parts = zip(
        codes.split(outputs, 1), scale.split(outputs, 1), zero.split(outputs, 1), strict=True
    )
    return [
        QuantizedWeight(
            codes=codes_of_layer.T.contiguous(),
            scale=scale_of_layer.T.contiguous().to(fmt.dtype),
            zero=None if fmt.sym else zero_of_layer.T.contiguous().to(torch.int16),
            fmt=fmt,
        )
        for codes_of_layer, scale_of_layer, zero_of_layer in parts
    ], strength


def update_strength(moments: GroupMoments) -> Float[Tensor, ""]:
    """Return how much of the ridge update holds on the samples kept apart; without any, nothing."""
    if moments.held_out is None:
        return moments.fitted.second.new_zeros(())
    # The damping is taken back: it belongs to all samples together.
    undamped = moments.fitted.second.diagonal().clone()
    curvature = factorize(damp_(moments.fitted.second))
    update = ridge_update(curvature, moments.fitted.cross)
    moments.fitted.second.diagonal().copy_(undamped)
    weight = moments.weight.double() if moments.through_weight else None
    return held_out_strength(update, moments.held_out, weight)


def round_and_refine(
    target: Float[Tensor, "in out"], fmt: WeightFormat, curvature: Curvature
) -> tuple[Float[Tensor, "in out"], Grid]:
    """Return codes and grid of W*: error feedback, then scales and codes improved in turn."""
    grid = search_grid(target, fmt)
    codes = round_with_error_feedback(target, grid, curvature)

    # Scales that fit the codes, codes that fit the scales.
    hessian = curvature.hessian.to(target.dtype)
    for _ in range(REFINEMENT_PASSES):
        scale = refit_scales(codes, grid, target, hessian)
        grid = replace(grid, scale=simulate_storage(scale, grid.fmt))
        codes = coordinate_descent_sweep(codes, grid, target, hessian, curvature.order)
    return codes, grid


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


def damp_(second_moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return H = X^T X + d mean(diag(X^T X)) I, with d = ``DAMPING``, in place of X^T X.

    The damping bounds the update by inputs that are rarely active. An input that is never active gets
    d times the mean of all, so that H can be inverted.
    """
    diagonal = second_moment.diagonal()
    diagonal += DAMPING * diagonal.mean()
    return second_moment


def factorize(hessian: Float[Tensor, "in in"]) -> Curvature:
    """Return H with its Cholesky factor; one that is not finite or not positive gives NaN.

    The most active input is rounded first: its error can be spread over all others.
    """
    order = hessian.diagonal().argsort(descending=True)
    reverse = order.flip(0)
    # Not ``cholesky``, which waits for a GPU to tell whether it failed.
    cholesky, _ = torch.linalg.cholesky_ex(hessian[reverse.unsqueeze(1), reverse])
    return Curvature(hessian=hessian, order=order, cholesky=cholesky)


def ridge_update(curvature: Curvature, cross_moment: Float[Tensor, "in out"]) -> Tensor:
    """Return H^-1 X^T E [in, out], the transposed update of the weight; ``cross_moment`` is X^T E."""
    return curvature.solve(cross_moment)


def held_out_strength(
    update: Float[Tensor, "in k"],
    held_out: InputMoments,
    weight: Float[Tensor, "out k"] | None = None,
) -> Float[Tensor, ""]:
    """Return the share of an update that lowers the error on held-out samples most, within 0 to 1.

    With B the update, the squared error of s B there is s^2 tr(B^T X^T X B) - 2 s tr(B^T X^T E) and a
    constant: a parabola in s. Without any benefit the share is 0.

    Args:
        update: B, or what becomes B when it is multiplied with W^T.
        held_out: Moments of the held-out samples.
        weight: W in the second case; then X^T E is ``held_out.cross`` W^T.
    """
    seen = update if weight is None else update @ (weight.T @ weight)
    benefit = (seen * held_out.cross).sum()
    cost = (seen * (held_out.second @ update)).sum()
    return torch.where(cost > 0, benefit / cost, 0.0).clamp(0, 1)


def round_with_error_feedback(
    target: Float[Tensor, "in out"], grid: Grid, curvature: Curvature
) -> Float[Tensor, "in out"]:
    """Return the codes of W*, rounded column by column with error feedback (GPTQ).

    With U the upper Cholesky factor of H^-1 and e_j the error of column j over U_jj, each later column k
    loses e_j U_jk. Columns are taken in the order of falling diag(H).

    Args:
        target: W*, transposed.
        grid: D and z of every group.
        curvature: H and its factor.
    """
    order = curvature.order
    factor = curvature.inverse_factor(target.dtype)

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

    These are a few steps of conjugate gradients for the least squares of a row's scales, preconditioned
    with what each group contributes alone. A row with one scale is solved by the first step. The normal
    equations themselves would need ``groups`` copies of the weight.

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
    scale, direction, previous = grid.scale, torch.zeros_like(grid.scale), None
    for _ in range(SCALE_STEPS):
        downhill = (levels * slope.view_as(levels)).sum(dim=1)
        step = _divide(downhill, curvature)
        gain = (downhill * step).sum(dim=0)
        direction = step if previous is None else step + _divide(gain, previous) * direction
        previous = gain

        # As far along the direction as lowers the error most.
        change = (levels * direction.unsqueeze(1)).flatten(0, 1)
        bend = hessian @ change
        length = _divide((direction * downhill).sum(dim=0), (change * bend).sum(dim=0))
        scale = scale + length * direction
        slope = slope - length * bend

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
