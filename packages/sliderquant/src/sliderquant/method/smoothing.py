"""Channel scales in closed form, for linear layers whose inputs are rounded token by token.

This is not from the SliderQuant paper, which trains the scales. As in SmoothQuant (arXiv 2211.10438),
channel j of what layers read is divided by s_j and their columns j are multiplied by it: the largest
channels set the scale of a token's grid, the largest columns that of a row's grid. Here
s_j = sqrt(rms(x_j) / rms(w_j)), which makes the two root mean squares equal up to one factor for each
place. It is done at every place where a scale cancels, not only behind norms.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.method.decoder import Decoder
from sliderquant.method.layout import COLUMNS, ScaledParameter, ScalingSite, reading_module
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.parallel import sum_over_processes
from sliderquant.method.precision import forward_precision


@torch.no_grad()
def set_smoothing_factors_(
    decoder: Decoder,
    block: int,
    learnables: BlockLearnables,
    tensors: dict[str, Tensor],
    x_fp: Float[Tensor, "n t h"],
    batch_size: int,
) -> None:
    """Set the channel scales of a block from what its layers read in the full-precision model, in place.

    Args:
        decoder: The model.
        block: Number of the block.
        learnables: Of the block; its ``factors`` are set.
        tensors: Parameters of the block.
        x_fp: Hidden states that enter the block in the full-precision model.
        batch_size: Samples per forward pass.
    """
    # Weights that read a scaled channel; a block that scales none is not run.
    weights = {name: tensors[name] for name in learnables.names}
    readers = {reader.name for site in learnables.sites for reader in scaled_readers(site, weights)}
    if not readers:
        return

    # Mean of the squares of each input channel, over all tokens of all processes.
    sums: dict[str, Tensor] = {}
    modules = [reading_module(name) for name in sorted(readers)]
    for hidden in x_fp.split(batch_size):
        with forward_precision(decoder.device):
            inputs = decoder.inputs_inside(block, hidden, tensors, modules)
        for name in sorted(readers):
            squares = inputs[reading_module(name)].float().square().flatten(0, -2).sum(dim=0)
            sums[name] = squares + sums.get(name, 0)
    tokens = next(iter(sums.values())).new_tensor(x_fp.shape[:2].numel())
    tokens = sum_over_processes(tokens)
    mean_squares = {name: sum_over_processes(sums[name]) / tokens for name in sorted(sums)}

    for site, factor in zip(learnables.sites, learnables.factors, strict=True):
        factor.copy_(smoothing_factors(site, weights, mean_squares))


def scaled_readers(site: ScalingSite, names: Collection[str]) -> list[ScaledParameter]:
    """Return the weights in ``names`` whose columns a site scales; none between queries and keys."""
    return [p for p in site.parameters if p.axis == COLUMNS and p.name in names]


def smoothing_factors(
    site: ScalingSite,
    weights: Mapping[str, Float[Tensor, "*experts out in"]],
    mean_squares: Mapping[str, Float[Tensor, " in"]],
) -> Float[Tensor, " size"]:
    """Return s of a site, with a geometric mean of one.

    Columns that share an entry (heads that read the same values) share its means. An entry that is never
    active, or whose weights are zero, stays at one; so does a site that has no columns.

    Args:
        site: Place of the scaling.
        weights: The weights that are rounded, by name.
        mean_squares: Mean of x_j^2 over the calibration tokens, for each weight that reads the site.
    """
    readers = scaled_readers(site, weights)
    if not readers:
        device = next(iter(weights.values())).device if weights else None
        return torch.ones(site.size, device=device)

    # Sums of squares, and how many squares they hold, of the inputs and of the weights of each column.
    x = torch.cat([mean_squares[reader.name] for reader in readers])
    flat = {reader.name: weights[reader.name].flatten(0, -2) for reader in readers}
    w = torch.cat([flat[reader.name].float().square().sum(dim=0) for reader in readers])
    rows = torch.cat([torch.full_like(mean_squares[r.name], len(flat[r.name])) for r in readers])

    # Columns that share an entry of s are added up.
    index = torch.cat([reader.index for reader in readers]).to(x.device)
    columns = torch.stack([x, torch.ones_like(x), w, rows])
    x_sum, x_count, w_sum, w_count = columns.new_zeros(4, site.size).index_add(1, index, columns)

    # A quarter of the log ratio of mean squares is the square root of a ratio of root mean squares.
    active = (x_sum > 0) & (w_sum > 0)
    power = (x_sum / x_count).log() - (w_sum / w_count).log()
    power = torch.where(active, power / 4, 0.0)
    return torch.where(active, power - power.sum() / active.sum().clamp(min=1), 0.0).exp()
