"""Parameter-space reuse: a larger model's weights from a smaller one's.

Paper: "Chain-of-Models Pre-Training" (Fan et al., CVPR 2026, arXiv 2604.12391). Everything here is a
function of state dicts and a ``Layout``. The mode ``official`` repeats the released routine, the mode
``embed`` is what that routine seems meant to do: blocks of Q, K and V stay where they belong.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from com_pt.errors import ChainOrderError, GrowthError, LayoutError, NonFiniteWeightsError
from com_pt.method.copying import copy_corner_block, copy_leading_entries
from com_pt.method.layout import Layout, Rule
from com_pt.method.lossless import (
    TowerPlan,
    duplicate_channels,
    eps_factors,
    extend_channels,
    plan_towers,
)
from com_pt.method.matching import State, match_parameters
from com_pt.method_config import GrowthMode, GrowthSettings


@dataclass
class GrowthReport:
    """What a grown model inherited.

    Attributes:
        mode: Growth mode.
        depth: Depth rule; ``released`` is the one of the released routine.
        copied: Target parameters that came from the source, wholly or in part.
        fresh: Target parameters left as they were initialised.
        skipped: Source parameters that no target took.
        inherited: Fraction of the target's numbers that came from the source.
        layers: For each stack, the source layer of every target layer; None where it stays fresh.
        eps_factor: For each tower, what the eps of its norms must be multiplied by.

    Example:
        >>> GrowthReport("embed", "interleave", inherited=0.25).to_json()["inherited"]
        0.25
    """

    mode: str
    depth: str
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    inherited: float = 0.0
    layers: dict[str, list[int | None]] = field(default_factory=dict)
    eps_factor: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return dict(vars(self))


def grow_state(
    small: State, fresh: State, source: Layout, target: Layout, settings: GrowthSettings
) -> tuple[dict[str, Tensor], GrowthReport]:
    """Compute the grown state dict of the target.

    Args:
        small: The source's parameters.
        fresh: The target's, freshly initialised; not changed.
        source: Layout of the source.
        target: Layout of the target.
        settings: Mode, depth rule and so on.

    Returns:
        The grown parameters under the target's names, and what they inherited.

    Raises:
        LayoutError: If a parameter has no roles, or one side lacks it.
        GrowthError: If the two models cannot be connected in this mode.
        ChainOrderError: If the target is smaller in some axis.
        NonFiniteWeightsError: If the source holds NaN or infinities.
    """
    # Refuse what no mode can connect, or what is no number.
    check_models(source, target)
    check_weights(small)

    # Which parameter comes from which, and what lossless growth does with each tower.
    matching = match_parameters(small, fresh, source, target, settings)
    plans = plan_towers(source, target) if settings.mode == "lossless" else {}
    report = GrowthReport(settings.mode, settings.depth_rule)
    report.layers, report.skipped = matching.layers, matching.skipped
    report.eps_factor = eps_factors(plans)

    # Grow each parameter on its device.
    generator = torch.Generator().manual_seed(settings.seed)
    grown: dict[str, Tensor] = {}
    inherited = 0
    for name, value in fresh.items():
        match = matching.parameters[name]
        tensor, count = None, 0
        if match is not None:
            part = small[match.origin].to(value.dtype)
            tensor, count = _grow_parameter(
                name, part, value, match.rule, settings.mode, plans, generator
            )
            # An idle copy of a layer adds nothing to the residual stream.
            if tensor is not None and match.is_idle and any(a.writes for a in match.rule.axes):
                tensor, count = torch.zeros_like(tensor), tensor.numel()
        grown[name] = value if tensor is None else tensor
        (report.fresh if tensor is None else report.copied).append(name)
        inherited += count

    report.inherited = inherited / max(1, sum(value.numel() for value in fresh.values()))
    return grown, report


def check_models(source: Layout, target: Layout) -> None:
    """Refuse pairs that no mode can connect.

    Raises:
        GrowthError: If families, head sizes, groups of heads or fixed facts differ.
    """
    # Both are of one family, and agree in what stays the same along a chain.
    if source.name != target.name:
        raise GrowthError(
            f"{source.name} cannot grow into {target.name}; use two models of one family"
        )
    for fact, value in source.fixed.items():
        if target.fixed.get(fact) != value:
            raise GrowthError(
                f"{fact} is {value} in the small model and {target.fixed.get(fact)} in the large one; "
                "keep it the same along the chain"
            )

    # Heads keep their size, and the queries that share a key.
    for name, large in target.towers.items():
        small = source.towers[name]
        where = f"{name} " if name else ""
        if small.head_dim != large.head_dim:
            raise GrowthError(
                f"{where}heads have {small.head_dim} channels and {large.head_dim}; "
                "add heads and keep their size"
            )
        small_group, large_group = (
            tower.heads // (tower.kv_heads or tower.heads) for tower in (small, large)
        )
        if small_group != large_group:
            raise GrowthError(
                f"{small_group} query heads share a key head in the small model, {large_group} in the "
                "large one; keep the ratio"
            )


def check_weights(state: State) -> None:
    """Refuse a source without values or with bad ones.

    Raises:
        GrowthError: If tensors are quantised.
        NonFiniteWeightsError: If they hold NaN or infinities.
    """
    for name, value in state.items():
        if not value.is_floating_point() and value.dim() > 0:
            raise GrowthError(f"{name} is {value.dtype}; grow from an unquantised checkpoint")

    # One wait for the device, whatever the number of tensors.
    finite = [torch.isfinite(value).all() for value in state.values()]
    if finite and not bool(torch.stack(finite).all()):
        name = next(name for name, fine in zip(state, finite, strict=True) if not bool(fine))
        raise NonFiniteWeightsError(
            f"{name} holds NaN or infinity; use an earlier checkpoint of the small model"
        )


def _grow_parameter(
    name: str,
    part: Tensor,
    fresh: Tensor,
    rule: Rule,
    mode: GrowthMode,
    plans: Mapping[str, TowerPlan],
    generator: torch.Generator,
) -> tuple[Tensor | None, int]:
    """Grow one parameter, and name it in whatever is refused."""
    try:
        return _grow_tensor(part, fresh, rule, mode, plans, generator)
    except (GrowthError, ChainOrderError, LayoutError) as error:
        raise type(error)(f"{name}: {error}") from None
    except RuntimeError as error:
        if mode != "official":  # whose slices do not check sizes
            raise
        raise ChainOrderError(
            f"{name}: {tuple(part.shape)} does not fit into {tuple(fresh.shape)}; "
            "order the chain from small to large"
        ) from error


def _grow_tensor(
    part: Tensor,
    fresh: Tensor,
    rule: Rule,
    mode: GrowthMode,
    plans: Mapping[str, TowerPlan],
    generator: torch.Generator,
) -> tuple[Tensor | None, int]:
    """Return the grown tensor (None: left fresh) and how many of its numbers are inherited."""
    # The released code does not know what axes mean.
    if mode == "official":
        grown = copy_corner_block(part, fresh)
        return grown, 0 if grown is None else part.numel()
    if len(rule.axes) != fresh.dim() or part.dim() != fresh.dim():
        raise LayoutError(f"it has {fresh.dim()} axes and {len(rule.axes)} roles; fix the layout")

    # The other modes put every entry where its role says.
    if mode == "embed":
        return copy_leading_entries(part, fresh, rule), part.numel()
    plan = plans[rule.tower]
    if plan.method == "duplicate":
        return duplicate_channels(part, fresh, rule, generator), fresh.numel()
    return extend_channels(part, fresh, rule, fill=plan.fill), part.numel()
