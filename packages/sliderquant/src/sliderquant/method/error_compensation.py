"""Closed-form rounding in which later columns and later layers make up for earlier rounding errors.

This method is not from the SliderQuant paper; it needs neither windows nor gradients. The linear layers
of a block are solved in the order in which the block computes them, each for the inputs that it receives
in the quantized model. Symbols: W [out, in] is the weight, X [n, in] those inputs, E [n, out] what the
layer's output lacks to equal the full-precision model's, d the damping.

1. ``block_rounding.collect_moments`` runs both models over the samples and sums X^T X and X^T E.
2. ``damped_hessian`` gives H = X^T X + d mean(diag(X^T X)) I.
3. ``ridge_update`` gives W* = W + (H^-1 X^T E)^T, the ridge regression that makes up for the errors of
   all layers before. The target is the output that the layer would have in the full-precision model, as
   in GPTAQ (arXiv 2504.02692). A layer that writes to the residual stream also corrects the error that
   the stream already carries.
4. ``round_with_error_feedback`` rounds the columns of W* one after the other, the most active input
   first. The columns behind take over what a column lacks, as in GPTQ (arXiv 2210.17323).
5. ``refit_scales`` and ``coordinate_descent_sweep`` take turns in lowering the squared error of the
   output, tr((W* - W^) H (W* - W^)^T): the scales of a row by least squares, the codes one column at a
   time, as in QuantEase (arXiv 2309.01885).

The grid is first that of W, without clipping: columns need room for the errors that they take over.

Where activations are rounded too, X is what the layer multiplies with, after rounding. Channels are
scaled first (see ``smoothing``), and W and X are those of the scaled model.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.method.quantizer import (
    QuantizedWeight,
    WeightFormat,
    quantization_grid,
    simulate_storage,
)

DAMPING = 0.01  # d, the share of the mean diagonal that is added to X^T X, as in GPTQ
REFINEMENT_PASSES = 4  # times that scales and codes are improved in turn (step 5)
COLUMN_BLOCK = 128  # columns whose errors reach all columns behind them in one matrix product


def round_weight(
    weight: Float[Tensor, "out in"],
    fmt: WeightFormat,
    second_moment: Float[Tensor, "in in"],
    cross_moment: Float[Tensor, "in out"],
) -> QuantizedWeight:
    """Return a weight rounded for its inputs: steps 2 to 5 of the method.

    Args:
        weight: W.
        fmt: Storage format; its group size divides ``in``.
        second_moment: X^T X, float64.
        cross_moment: X^T E, float64.
    """
    # One scale and one zero point per group, those of the weight before its update.
    weight = weight.float()
    group_size = fmt.columns_per_group(weight.shape[1])
    scale, zero = quantization_grid(weight.unflatten(-1, (-1, group_size)), fmt)
    scale, zero = scale.squeeze(-1), zero.squeeze(-1)
    column_zero = zero.repeat_interleave(group_size, dim=-1)

    # Make up for the errors of the layers before, then round with the errors carried along.
    hessian = damped_hessian(second_moment)
    target = ridge_update(weight, hessian, cross_moment)
    column_scale = scale.repeat_interleave(group_size, dim=-1)
    codes = round_with_error_feedback(target, column_scale, column_zero, fmt, hessian)

    # Scales that fit the codes, codes that fit the scales, in turn.
    for _ in range(REFINEMENT_PASSES):
        levels = (codes - column_zero).unflatten(-1, (-1, group_size))
        scale = simulate_storage(refit_scales(levels, scale, target, hessian), fmt)
        column_scale = scale.repeat_interleave(group_size, dim=-1)
        codes = coordinate_descent_sweep(
            codes, column_scale, column_zero, fmt, target, hessian.to(target.dtype)
        )
    return QuantizedWeight(
        codes=codes.to(torch.int16),
        scale=scale.to(fmt.dtype),
        zero=None if fmt.sym else zero.to(torch.int16),
        fmt=fmt,
    )


def damped_hessian(second_moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return H = X^T X + d mean(diag(X^T X)) I, with d = ``DAMPING``.

    The damping bounds the update by inputs that are rarely active. An input that is never active gets
    d times the mean of all, so that H can be inverted.
    """
    mean = second_moment.diagonal().mean().clamp(min=torch.finfo(second_moment.dtype).tiny)
    identity = torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)
    return second_moment + DAMPING * mean * identity


def ridge_update(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross_moment: Float[Tensor, "in out"],
) -> Float[Tensor, "out in"]:
    """Return W* = W + (H^-1 X^T E)^T in the type of ``weight``; ``cross_moment`` is X^T E."""
    return weight + torch.linalg.solve(hessian, cross_moment).T.to(weight.dtype)


def round_with_error_feedback(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Return the codes of a weight, rounded column by column with error feedback (GPTQ).

    With U the upper Cholesky factor of H^-1 and e_j the error of column j over U_jj, each later column k
    loses e_j U_jk. Columns are taken in the order of falling diag(H).

    Args:
        weight: W*, float32.
        scale: D of every weight.
        zero: z of every weight.
        fmt: Storage format.
        hessian: H, float64.
    """
    # The most active input first: its error can be spread over all others.
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_cholesky_factor(hessian[order][:, order]).to(weight.dtype)

    # The codes come back in the order of the columns of the weight.
    remaining, scale, zero = weight[:, order], scale[:, order], zero[:, order]
    codes = torch.empty_like(remaining)
    codes[:, order] = round_columns_(remaining, scale, zero, fmt, factor, len(order))
    return codes


def inverse_cholesky_factor(hessian: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return U, the upper Cholesky factor of H^-1: U^T U = H^-1."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def round_columns_(
    remaining: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    factor: Float[Tensor, "in in"],
    columns: int,
) -> Float[Tensor, "out in"]:
    """Return the codes of the leading columns; those behind them take over the errors, in place.

    Args:
        remaining: W*, its columns in the order of rounding.
        scale: D of every weight, in that order.
        zero: z of every weight.
        fmt: Storage format.
        factor: U, the upper Cholesky factor of H^-1.
        columns: How many to round; fewer than all only to measure what one costs.
    """
    low, high = fmt.code_range
    codes = torch.empty_like(remaining)
    for begin in range(0, columns, COLUMN_BLOCK):
        # Within a block of columns, errors are passed on at once.
        end = min(begin + COLUMN_BLOCK, columns)
        errors = []
        for j in range(begin, end):
            wanted, d, z = remaining[:, j], scale[:, j], zero[:, j]
            codes[:, j] = ((wanted / d).round() + z).clamp(low, high)
            value = ((codes[:, j] - z) * d).to(fmt.dtype)
            errors.append((wanted - value) / factor[j, j])
            remaining[:, j + 1 : end] -= torch.outer(errors[-1], factor[j, j + 1 : end])

        # The columns behind the block get the errors of the whole block in one product.
        remaining[:, end:] -= torch.stack(errors, dim=1) @ factor[begin:end, end:]
    return codes


def refit_scales(
    levels: Float[Tensor, "out groups g"],
    scale: Float[Tensor, "out groups"],
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out groups"]:
    """Return the scales D of each row that minimise (t - D c) H (t - D c)^T, with the levels c held.

    Args:
        levels: q - z of every weight, by group.
        scale: D so far; kept where the best one is not within a factor of two.
        target: W*, of which t is a row.
        hessian: H, in the type to solve in.
    """
    # What each group's levels contribute, seen through H: [out, groups, in].
    groups, group_size = levels.shape[1:]
    c = levels.to(hessian.dtype)
    through = torch.einsum("ogi,gik->ogk", c, hessian.view(groups, group_size, -1))

    # The normal equations of each row. A group whose levels are all zero has no equation; one of its own
    # keeps its scale.
    normal = torch.einsum("ogpi,opi->ogp", through.unflatten(-1, (groups, group_size)), c)
    wanted = torch.einsum("ogk,ok->og", through, target.to(hessian.dtype))
    empty = torch.diag_embed((normal.diagonal(dim1=-2, dim2=-1) == 0).to(hessian.dtype))
    best = torch.linalg.solve(normal + empty, wanted).to(scale.dtype)

    # A scale that changes more than that belongs to codes that are far from the best ones.
    return torch.where((best > scale / 2) & (best < scale * 2), best, scale)


def coordinate_descent_sweep(
    codes: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Return codes after one sweep over the columns, each code the best one with all others held.

    Args:
        codes: Codes so far.
        scale: D of every weight.
        zero: z of every weight.
        fmt: Storage format.
        target: W*.
        hessian: H, in the type of ``target``.
    """
    order = hessian.diagonal().argsort(descending=True)
    slope = ((target - (codes - zero) * scale) @ hessian)[:, order]

    # Columns are put in the order of the sweep on the device, so that the host need not know it.
    codes, scale, zero = codes[:, order], scale[:, order], zero[:, order]
    hessian = hessian[order][:, order]
    sweep_columns_(codes, slope, scale, zero, fmt, hessian, len(order))
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def sweep_columns_(
    codes: Float[Tensor, "out in"],
    slope: Float[Tensor, "out in"],
    scale: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    hessian: Float[Tensor, "in in"],
    columns: int,
) -> None:
    """Give the leading columns their best codes, one after the other, in place.

    Args:
        codes: Codes so far, columns in the order of the sweep; so are the others.
        slope: (W* - W^) H, kept up to date.
        scale: D of every weight.
        zero: z of every weight.
        fmt: Storage format.
        hessian: H.
        columns: How many to visit; fewer than all only to measure what one costs.
    """
    low, high = fmt.code_range
    for j in range(columns):
        q, d, z = codes[:, j], scale[:, j], zero[:, j]
        best_value = (q - z) * d + slope[:, j] / hessian[j, j]
        best = ((best_value / d).round() + z).clamp(low, high)
        slope -= torch.outer((best - q) * d, hessian[j])
        codes[:, j] = best
