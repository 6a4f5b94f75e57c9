"""Channel scales in closed form, for linear layers whose inputs are rounded token by token.

Not from the SliderQuant paper, which trains them. As in SmoothQuant (arXiv 2211.10438), channel j of
what layers read is divided by s_j, their columns j are multiplied by it: large channels set the step of
a token's grid, large columns that of a row's. Here s_j = sqrt(rms(x_j) / rms(w_j)), which makes the
two root mean squares equal, and it is done at every place where a scale cancels, not only behind norms.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sliderquant.method.layout import COLUMNS, Site, Touch


def reading(site: Site, names: Collection[str]) -> list[Touch]:
    """Return what a site does to the columns of weights in ``names``; nothing between q and k."""
    return [touch for touch in site.touches if touch.axis == COLUMNS and touch.name in names]


def smoothing_factors(
    site: Site,
    weights: Mapping[str, Float[Tensor, "out in"]],
    squares: Mapping[str, Float[Tensor, " in"]],
) -> Float[Tensor, " size"]:
    """Return s of a site, with a geometric mean of one.

    Columns that share an entry (heads that read the same values) share its means. An entry that is never
    active, or whose weights are zero, stays at one; so does a site that has no columns.

    Args:
        site: Place.
        weights: Those that are rounded, by name.
        squares: Mean of x_j^2 over the calibration tokens, for each weight that reads the site.
    """
    touches = reading(site, weights)
    if not touches:
        device = next(iter(weights.values())).device if weights else None
        return torch.ones(site.size, device=device)
    x = torch.cat([squares[touch.name] for touch in touches])
    w = torch.cat([weights[touch.name].float().square().sum(dim=0) for touch in touches])
    rows = torch.cat([torch.full_like(squares[t.name], len(weights[t.name])) for t in touches])
    index = torch.cat([touch.index for touch in touches]).to(x.device)
    columns = torch.stack([x, torch.ones_like(x), w, rows])
    x_sum, x_count, w_sum, w_count = columns.new_zeros(4, site.size).index_add(1, index, columns)
    active = (x_sum > 0) & (w_sum > 0)
    power = (x_sum / x_count).log() - (w_sum / w_count).log()
    power = torch.where(active, power / 4, 0.0)  # a square root of ratios of square roots
    return torch.where(active, power - power.sum() / active.sum().clamp(min=1), 0.0).exp()
