"""Rounding that carries its error along, towards the full-precision model: no windows, no gradients.

Not from the SliderQuant paper. Linear layers are solved in closed form, in the order in which a block
computes them, each with the inputs that it gets in the quantized model. Symbols: W [out, in] weight,
X [n, in] those inputs, E [n, out] what the layer's output lacks for the full-precision model's value at
the place where it arrives, H = X^T X + d mean(diag(X^T X)) I with damping d.

1. W* = W + (H^-1 X^T E)^T, the ridge regression that makes up for the error of all layers before.
   Towards full-precision inputs, as in GPTAQ (arXiv 2504.02692); for layers that write to the residual
   stream, E holds the error of the stream itself too.
2. Columns of W* are rounded one after the other, the most active input first. What a column lacks is
   taken over by the columns after it, as in GPTQ (arXiv 2210.17323): with U the upper Cholesky factor of
   H^-1 and e_j the error of column j over U_jj, column k > j loses e_j U_jk.
3. Steps and codes are improved in turn, both to lower tr((W* - W^) H (W* - W^)^T): the steps of a row by
   least squares, the codes by one sweep of coordinate descent, as in QuantEase (arXiv 2309.01885).

The grid is first that of W, without clipping: columns need room for what they take over.

Where activations are rounded too, X is what the layer multiplies with, after rounding, and channels are
scaled first (see ``smoothing``): then W and X are those of the scaled model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.method.activations import ActivationFormat, fake_quantize_tokens
from sliderquant.method.decoder import Decoder
from sliderquant.method.layout import BlockLayout, scale_channels
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.quantizer import (
    QuantizedWeight,
    WeightFormat,
    codes,
    quantization_grid,
    stored,
)
from sliderquant.method.smoothing import reading, smoothing_factors

DAMPING = 0.01  # d, as in GPTQ
TURNS = 4  # of step 3
LAZY = 128  # columns whose errors reach the columns behind them in one product
WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Linear layers that read the same input.

    Attributes:
        names: Their weights.
        place: Where their output should equal the full-precision model's: in front of this module of
            the block, behind the block if empty, right behind the layers if ``None``.
    """

    names: tuple[str, ...]
    place: str | None


def steps_of(layout: BlockLayout) -> list[Step]:
    """Return the linear layers of a block in computing order; fused experts are left out.

    The readers of a norm are followed by the writer to the residual stream. A norm between writer and
    stream (Gemma) leaves the writer its own output to aim at.
    """
    (_, attention), (norm, mlp) = layout.readers.items()
    output, down = layout.writers[:2]
    streams = (norm.removesuffix(WEIGHT), "") if not layout.output_norms else (None, None)
    found = ((attention, None), ((output,), streams[0]), (mlp, None), ((down,), streams[1]))
    wanted = [n for n in layout.linears if n.endswith(WEIGHT)]
    steps = [Step(names=tuple(n for n in names if n in wanted), place=p) for names, p in found]
    return [step for step in steps if step.names]


def damped(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return H from X^T X; inputs that are never active get the mean of the others."""
    mean = moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    return moment + DAMPING * mean * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )


def regressed(
    weight: Float[Tensor, "out in"], h: Float[Tensor, "in in"], cross: Float[Tensor, "in out"]
) -> Float[Tensor, "out in"]:
    """Return W* = W + (H^-1 X^T E)^T, with ``cross`` = X^T E; in the type of ``weight``."""
    return weight + torch.linalg.solve(h, cross).T.to(weight.dtype)


def feedback_codes(
    weight: Float[Tensor, "out in"],
    step: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    h: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Return the codes of a weight, rounded column by column with error feedback.

    Args:
        weight: W*, float32.
        step: D of every weight.
        zero: z of every weight.
        fmt: Storage format.
        h: H, float64.
    """
    order = h.diagonal().argsort(descending=True)
    upper = inverse_factor(h[order][:, order]).to(weight.dtype)
    rest, step, zero = weight[:, order], step[:, order], zero[:, order]
    result = torch.empty_like(rest)
    result[:, order] = round_columns_(rest, step, zero, fmt, upper, len(order))
    return result


def inverse_factor(h: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return U, the upper Cholesky factor of H^-1."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def round_columns_(
    rest: Float[Tensor, "out in"],
    step: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    upper: Float[Tensor, "in in"],
    columns: int,
) -> Float[Tensor, "out in"]:
    """Return the codes of the leading columns; those behind them take over the errors, in place.

    Args:
        rest: W*, its columns in the order of rounding.
        step: D of every weight, in that order.
        zero: z of every weight.
        fmt: Storage format.
        upper: U.
        columns: How many to round; fewer than all only to measure what one costs.
    """
    found = torch.empty_like(rest)
    for begin in range(0, columns, LAZY):
        end = min(begin + LAZY, columns)
        errors = []
        for j in range(begin, end):
            found[:, j] = codes(rest[:, j], step[:, j], zero[:, j], fmt)
            value = stored((found[:, j] - zero[:, j]) * step[:, j], fmt)
            errors.append((rest[:, j] - value) / upper[j, j])
            rest[:, j + 1 : end] -= torch.outer(errors[-1], upper[j, j + 1 : end])
        rest[:, end:] -= torch.stack(errors, dim=1) @ upper[begin:end, end:]
    return found


def fitted_steps(
    levels: Float[Tensor, "out groups g"],
    step: Float[Tensor, "out groups"],
    target: Float[Tensor, "out in"],
    h: Float[Tensor, "in in"],
) -> Float[Tensor, "out groups"]:
    """Return the steps D of each row that minimise (t - D c) H (t - D c)^T, with the levels c held.

    Args:
        levels: q - z of every weight, by group.
        step: D so far; kept where the best one is not within a factor of two.
        target: W*, of which t is a row.
        h: H, in the type to solve in.
    """
    groups, size = levels.shape[1:]
    c = levels.to(h.dtype)
    # [out, groups, in]: what each group's levels contribute, seen through H.
    through = torch.einsum("ogi,gik->ogk", c, h.view(groups, size, -1))
    normal = torch.einsum("ogpi,opi->ogp", through.unflatten(-1, (groups, size)), c)
    wanted = torch.einsum("ogk,ok->og", through, target.to(h.dtype))
    # Groups whose levels are all zero have no equation; one of their own keeps their step.
    empty = torch.diag_embed((normal.diagonal(dim1=-2, dim2=-1) == 0).to(h.dtype))
    best = torch.linalg.solve(normal + empty, wanted).to(step.dtype)
    return torch.where((best > step / 2) & (best < step * 2), best, step)


def swept_codes(
    code: Float[Tensor, "out in"],
    step: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    target: Float[Tensor, "out in"],
    h: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """Return codes after one sweep of coordinate descent: each is the best one with the others held."""
    order = h.diagonal().argsort(descending=True)
    slope = ((target - (code - zero) * step) @ h)[:, order]

    # Columns are put in the order of the sweep on the device, so that the host need not know it.
    code, step, zero, h = code[:, order], step[:, order], zero[:, order], h[order][:, order]
    sweep_columns_(code, slope, step, zero, fmt, h, len(order))
    result = torch.empty_like(code)
    result[:, order] = code
    return result


def sweep_columns_(
    code: Float[Tensor, "out in"],
    slope: Float[Tensor, "out in"],
    step: Float[Tensor, "out in"],
    zero: Float[Tensor, "out in"],
    fmt: WeightFormat,
    h: Float[Tensor, "in in"],
    columns: int,
) -> None:
    """Give the leading columns their best codes, one after the other, in place.

    Args:
        code: Codes so far, columns in the order of the sweep; so are the others.
        slope: (W* - W^) H, kept up to date.
        step: D of every weight.
        zero: z of every weight.
        fmt: Storage format.
        h: H.
        columns: How many to visit; fewer than all only to measure what one costs.
    """
    for j in range(columns):
        value = (code[:, j] - zero[:, j]) * step[:, j]
        new = codes(value + slope[:, j] / h[j, j], step[:, j], zero[:, j], fmt)
        slope -= torch.outer((new - code[:, j]) * step[:, j], h[j])
        code[:, j] = new


def rounded_with_feedback(
    weight: Float[Tensor, "out in"],
    fmt: WeightFormat,
    moment: Float[Tensor, "in in"],
    cross: Float[Tensor, "in out"],
) -> QuantizedWeight:
    """Return a weight rounded for its inputs.

    Args:
        weight: W.
        fmt: Storage format; its group size divides ``in``.
        moment: X^T X, float64.
        cross: X^T E, float64.
    """
    weight = weight.float()
    h = damped(moment)
    size = fmt.columns_per_group(weight.shape[1])
    step, zero = quantization_grid(weight.unflatten(-1, (-1, size)), fmt)
    step, zero = step.squeeze(-1), zero.squeeze(-1)
    target, zeros = regressed(weight, h, cross), zero.repeat_interleave(size, dim=-1)
    code = feedback_codes(target, step.repeat_interleave(size, dim=-1), zeros, fmt, h)
    for _ in range(TURNS):
        levels = (code - zeros).unflatten(-1, (-1, size))
        step = stored(fitted_steps(levels, step, target, h), fmt)
        steps = step.repeat_interleave(size, dim=-1)
        code = swept_codes(code, steps, zeros, fmt, target, h.to(target.dtype))
    return QuantizedWeight(
        codes=code.to(torch.int16),
        step=step.to(fmt.dtype),
        zero=None if fmt.sym else zero.to(torch.int16),
        fmt=fmt,
    )


@torch.no_grad()
def round_blocks_(
    decoder: Decoder,
    tokens: Int[Tensor, "n t"],
    learnables: Sequence[BlockLearnables],
    batch_size: int,
    *,
    activations: ActivationFormat | None = None,
    on_block: Callable[[int], None],
    cache: Callable[[str, Tensor], Tensor],
) -> None:
    """Round every block in place of training it, front to back.

    Args:
        decoder: The model; its own weights stay as they are.
        tokens: Calibration samples.
        learnables: One per block; ``rounded`` of its linear layers and the factors of its sites are set.
            Fused experts stay as they are made.
        batch_size: Samples per forward pass.
        activations: Rounding of activations in the quantized model.
        on_block: Called once per block, in order, while it is in memory.
        cache: As for ``calibrate``.
    """
    embedded = decoder.block_inputs(tokens)
    x_fp, x_q = cache("x_fp", embedded), cache("x_q", embedded)
    for block in range(decoder.depth):
        decoder.hold([block])
        tensors, made = decoder.tensors(block), learnables[block]
        _smooth_(decoder, block, made, tensors, x_fp, batch_size)
        scaled = scale_channels(tensors, made.sites, list(made.factors))
        exact = tensors | scaled
        current = tensors | {name: stored(value, made.fmt) for name, value in scaled.items()}
        for step in steps_of(decoder.layout(block)):
            moment, crosses = collect_moments(
                decoder, block, step, (exact, current), (x_fp, x_q), batch_size, activations
            )
            for name in step.names:
                linear = made.linear(name)
                linear.rounded = rounded_with_feedback(
                    exact[name], linear.fmt, moment, crosses[name]
                )
                current[name] = linear(exact[name])
        for hidden, simulated, fmt in ((x_fp, tensors, None), (x_q, current, activations)):
            for part in hidden.split(batch_size):
                part.copy_(decoder.run_block(block, part, simulated, fmt))
        on_block(block)

        # Codes of all blocks together would fill a card; they are read again block by block.
        made.codes_to("cpu")


def _smooth_(
    decoder: Decoder,
    block: int,
    made: BlockLearnables,
    tensors: dict[str, Tensor],
    x_fp: Tensor,
    batch_size: int,
) -> None:
    """Set the factors of a block's sites from what its layers read in the full-precision model."""
    weights = {name: tensors[name] for name in made.names}
    names = {touch.name for site in made.sites for touch in reading(site, weights)}
    if not names:
        return
    squares: dict[str, Tensor] = {}
    modules = [name.removesuffix(WEIGHT) for name in names]
    for part in x_fp.split(batch_size):
        for module, x in decoder.inputs_inside(block, part, tensors, modules).items():
            mean = x.square().flatten(0, -2).sum(dim=0) / x_fp.shape[:2].numel()
            squares[module + WEIGHT] = mean + squares.get(module + WEIGHT, 0)
    for site, factor in zip(made.sites, made.factors, strict=True):
        factor.copy_(smoothing_factors(site, weights, squares))


def collect_moments(
    decoder: Decoder,
    block: int,
    step: Step,
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    hidden: tuple[Tensor, Tensor],
    batch_size: int,
    activations: ActivationFormat | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return X^T X of a step and X^T E of each of its weights, in float64.

    Args:
        decoder: The model.
        block: Its number.
        step: Layers that read the same input.
        tensors: Parameters in full precision, and those of the quantized model so far.
        hidden: x_fp and x_q.
        batch_size: Samples per forward pass.
        activations: Rounding in the quantized model.
    """
    exact = tensors[0]
    reader = step.names[0].removesuffix(WEIGHT)
    watched = [reader] if step.place is None else [reader, step.place]
    moment: Tensor | float = 0.0
    crosses: dict[str, Tensor | float] = dict.fromkeys(step.names, 0.0)
    for parts in zip(*(h.split(batch_size) for h in hidden), strict=True):
        wanted, now = (
            {
                name: value.flatten(0, -2)
                for name, value in decoder.inputs_inside(block, part, used, watched, fmt).items()
            }
            for part, used, fmt in zip(parts, tensors, (None, activations), strict=True)
        )
        x = now[reader]
        if activations is not None:
            x = fake_quantize_tokens(x, activations)
        moment = moment + (x.T @ x).double()
        for name in step.names:
            if step.place is None:
                error = (wanted[reader] - x) @ exact[name].T
            else:
                error = wanted[step.place] - now[step.place]
            crosses[name] = crosses[name] + (x.T @ error).double()
    return torch.as_tensor(moment), {n: torch.as_tensor(c) for n, c in crosses.items()}
