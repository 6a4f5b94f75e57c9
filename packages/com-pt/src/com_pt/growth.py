"""Parameter-space reuse: a larger model's weights from a smaller one's.

Paper: "Chain-of-Models Pre-Training" (Fan et al., CVPR 2026, arXiv 2604.12391). Everything here is a
function of state dicts and a ``Layout``. The mode ``official`` repeats the released routine, the mode
``embed`` is what that routine seems meant to do: blocks of Q, K and V stay where they belong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor

from com_pt.copying import embed, top_left
from com_pt.errors import ChainOrderError, GrowthError, LayoutError, NonFiniteWeightsError
from com_pt.layout import Layout, Rule
from com_pt.lossless import duplicate, extend, method_of

Mode = Literal["embed", "official", "lossless", "random"]
Depth = Literal["interleave", "stack", "identity"]
State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How to grow.

    Args:
        mode: ``embed`` leading entries per role; ``official`` the released code's top-left blocks;
            ``lossless`` the same outputs as before; ``random`` nothing.
        depth: Which source layer a target layer takes. None is ``identity`` for ``lossless`` and
            ``interleave`` for the others.
        strict: Refuse depths that are no multiple instead of rounding down.
        seed: Of the uneven split of ``lossless``.
        allow_missing: Name patterns (``*`` is any text) that may be missing, and stay fresh.
    """

    mode: Mode = "embed"
    depth: Depth | None = None
    strict: bool = False
    seed: int = 0
    allow_missing: Sequence[str] = ()

    @property
    def depth_rule(self) -> Depth:
        """The depth rule after defaults."""
        return self.depth or ("identity" if self.mode == "lossless" else "interleave")


@dataclass
class GrowthReport:
    """What a grown model inherited.

    Attributes:
        copied: Target parameters that came from the source, wholly or in part.
        fresh: Target parameters left as they were initialised.
        skipped: Source parameters that no target took.
        inherited: Fraction of the target's numbers that came from the source.
        layers: For each stack, the source layer of every target layer.
        eps_factor: For each tower, what the eps of its norms must be multiplied by.
    """

    mode: str
    depth: str
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    inherited: float = 0.0
    layers: dict[str, list[int]] = field(default_factory=dict)
    eps_factor: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def depth_map(small: int, large: int, rule: Depth, *, strict: bool = False) -> list[int]:
    """Source layer of each target layer: floor(j * small / large), or j mod small for ``stack``.

    Raises:
        GrowthError: If the target has fewer layers, or (``strict``) no multiple of them.
    """
    if small > large:
        raise GrowthError(
            f"depth falls from {small} to {large} layers; order the chain from small to large"
        )
    if strict and large % small:
        raise GrowthError(
            f"{large} layers are no multiple of {small}; choose a multiple or drop --strict"
        )
    if rule == "stack":
        return [j % small for j in range(large)]
    return [j * small // large for j in range(large)]


def grow_state(
    small: State, fresh: State, source: Layout, target: Layout, config: GrowthConfig
) -> tuple[dict[str, Tensor], GrowthReport]:
    """The grown state dict of the target.

    Args:
        small: The source's parameters.
        fresh: The target's, freshly initialised; not changed.
        source: Layout of the source.
        target: Layout of the target.
        config: Mode, depth rule and so on.

    Raises:
        LayoutError: If a parameter has no roles, or one side lacks it.
        GrowthError: If the two models cannot be connected in this mode.
        ChainOrderError: If the target is smaller in some axis.
        NonFiniteWeightsError: If the source holds NaN or infinities.
    """
    report = GrowthReport(config.mode, config.depth_rule)
    check_models(source, target)
    check_weights(small)
    layers = _layer_maps(small, fresh, source, target, config)
    report.layers = dict(layers)
    methods = method_of(source, target, layers) if config.mode == "lossless" else {}
    report.eps_factor = {tower: plan.eps_factor for tower, plan in methods.items()}
    generator = torch.Generator().manual_seed(config.seed)
    grown: dict[str, Tensor] = {}
    used: set[str] = set()
    written = 0
    for name, value in fresh.items():
        origin, is_copy = _origin(name, value, target, layers, config)
        rule = target.rule_of(name) if origin else None
        if rule is None or origin not in small:
            if rule is not None and not rule.optional:
                raise LayoutError(
                    f"the small model has no {origin} for {name}; use models of one family, or name it "
                    "in allow_missing to keep it fresh"
                )
            grown[name] = value
            report.fresh.append(name)
            continue
        used.add(origin)
        part = small[origin].to(value.dtype)
        made, count = _one(part, value, rule, config, methods, generator, name)
        writes = any(axis.writes for axis in rule.axes)
        if made is not None and is_copy and writes:
            made, count = torch.zeros_like(made), made.numel()
        grown[name] = value if made is None else made
        (report.fresh if made is None else report.copied).append(name)
        written += count
    _check_leftovers(small, used, target, config, report)
    report.inherited = written / max(1, sum(value.numel() for value in fresh.values()))
    return grown, report


def check_models(source: Layout, target: Layout) -> None:
    """Refuse pairs that no mode can connect.

    Raises:
        GrowthError: If families, head sizes, groups of heads or fixed facts differ.
    """
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
    for name, tower in target.towers.items():
        old = source.towers[name]
        where = f"{name} " if name else ""
        if old.head_dim != tower.head_dim:
            raise GrowthError(
                f"{where}heads have {old.head_dim} channels and {tower.head_dim}; "
                "add heads and keep their size"
            )
        groups = [t.heads // (t.kv_heads or t.heads) for t in (old, tower)]
        if groups[0] != groups[1]:
            raise GrowthError(
                f"{groups[0]} query heads share a key head in the small model, {groups[1]} in the large "
                "one; keep the ratio"
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


def _layer_maps(
    small: State, fresh: State, source: Layout, target: Layout, config: GrowthConfig
) -> dict[str, list[int]]:
    counts = [
        _depths(state, layout, config) for state, layout in ((small, source), (fresh, target))
    ]
    missing = set(counts[1]) - set(counts[0])
    if missing:
        raise LayoutError(
            f"the small model has no layers {min(missing)}; use two models of one family"
        )
    return {
        stack: depth_map(counts[0][stack], large, config.depth_rule, strict=config.strict)
        for stack, large in counts[1].items()
    }


def _depths(state: State, layout: Layout, config: GrowthConfig) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in state:
        if not _allowed(name, config) and (found := layout.layer_of(name)):
            depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
    return depths


def _origin(
    name: str, value: Tensor, target: Layout, layers: Mapping[str, list[int]], config: GrowthConfig
) -> tuple[str, bool]:
    """Source parameter of a target one ("" for none), and whether its layer is an idle copy."""
    if config.mode == "random" or _allowed(name, config):
        return "", False
    found = target.layer_of(name)
    if found is None:
        return name, False
    stack, layer = found
    chosen = layers[stack]
    is_copy = config.depth_rule == "identity" and layer != chosen.index(chosen[layer])
    return name.replace(f"{stack}.{layer}.", f"{stack}.{chosen[layer]}.", 1), is_copy


def _one(
    part: Tensor,
    value: Tensor,
    rule: Rule,
    config: GrowthConfig,
    methods: Mapping[str, Any],
    generator: torch.Generator,
    name: str,
) -> tuple[Tensor | None, int]:
    """The grown parameter (None: left fresh) and how many of its numbers are inherited."""
    try:
        if config.mode == "official":
            made = top_left(part, value)
            return made, 0 if made is None else part.numel()
        if len(rule.axes) != value.dim() or part.dim() != value.dim():
            raise LayoutError(
                f"it has {value.dim()} axes and {len(rule.axes)} roles; fix the layout"
            )
        if config.mode == "lossless":
            plan = methods[rule.tower]
            if plan.method == "duplicate":
                return duplicate(part, value, rule, generator), value.numel()
            return extend(part, value, rule, fill=plan.fill), part.numel()
        return embed(part, value, rule), part.numel()
    except (GrowthError, ChainOrderError, LayoutError) as error:
        raise type(error)(f"{name}: {error}") from None
    except RuntimeError as error:
        if config.mode != "official":  # whose slices do not check sizes
            raise
        raise ChainOrderError(
            f"{name}: {tuple(part.shape)} does not fit into {tuple(value.shape)}; "
            "order the chain from small to large"
        ) from error


def _check_leftovers(
    small: State, used: set[str], target: Layout, config: GrowthConfig, report: GrowthReport
) -> None:
    if config.mode == "random":
        return
    for name in small.keys() - used:
        if not _allowed(name, config) and not target.rule_of(name).optional:
            raise LayoutError(
                f"the large model has no place for {name}; use models of one family, or name it in "
                "allow_missing"
            )
        report.skipped.append(name)


def _allowed(name: str, config: GrowthConfig) -> bool:
    return any(fnmatch(name, pattern) for pattern in config.allow_missing)
