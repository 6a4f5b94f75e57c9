"""Which parameter of the small model each parameter of the large one is grown from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor

from com_pt.errors import GrowthError, LayoutError
from com_pt.method.layout import Layout, Rule
from com_pt.method_config import DepthRule, GrowthSettings

State = Mapping[str, Tensor]  # parameters and saved buffers by name


@dataclass(frozen=True)
class Match:
    """Where one parameter of the large model comes from.

    Attributes:
        origin: Name of the small model's parameter.
        rule: Roles of the axes of both.
        is_idle: Whether it belongs to a copy of a layer that must do nothing at first.
    """

    origin: str
    rule: Rule
    is_idle: bool


@dataclass(frozen=True)
class Matching:
    """All parameters of two models side by side.

    Attributes:
        parameters: For each parameter of the large model its match; None where it stays fresh.
        layers: For each stack, the source layer of every target layer; None where it stays fresh.
        skipped: Parameters of the small model that nothing is grown from.
    """

    parameters: dict[str, Match | None]
    layers: dict[str, list[int | None]]
    skipped: list[str]


def match_parameters(
    small: State, fresh: State, source: Layout, target: Layout, settings: GrowthSettings
) -> Matching:
    """Find the source of every parameter of the large model.

    Args:
        small: The small model's parameters.
        fresh: The large model's.
        source: Layout of the small model.
        target: Layout of the large model.
        settings: Depth rule, and names that may be missing.

    Raises:
        GrowthError: If depths cannot be connected.
        LayoutError: If a parameter has no roles, or one side lacks it.
    """
    layers = _match_layers(small, fresh, source, target, settings)

    # Each parameter of the large model has a source, may stay fresh, or is a fault.
    parameters: dict[str, Match | None] = {}
    for name in fresh:
        match = _match_parameter(name, target, layers, settings)
        if match is not None and match.origin not in small:
            if not match.rule.optional:
                raise LayoutError(
                    f"the small model has no {match.origin} for {name}; use models of one family, or "
                    "name it in allow_missing to keep it fresh"
                )
            match = None
        parameters[name] = match

    # Nothing of the small model is dropped in silence.
    used = {match.origin for match in parameters.values() if match is not None}
    skipped = [name for name in small if name not in used] if settings.mode != "random" else []
    for name in skipped:
        if not _may_be_missing(name, settings) and not target.rule_of(name).optional:
            raise LayoutError(
                f"the large model has no place for {name}; use models of one family, or name it in "
                "allow_missing"
            )
    return Matching(parameters, layers, skipped)


def depth_map(small: int, large: int, rule: DepthRule, *, strict: bool = False) -> list[int | None]:
    """Return the source layer of each target layer.

    It is floor(j * small / large) for ``interleave`` and ``identity``, j mod small for ``stack``, and
    j for ``leading``, where layers beyond the small model's have no source.

    Args:
        small: Layers of the small model.
        large: Layers of the large model.
        rule: ``interleave``, ``stack``, ``identity`` or ``leading``.
        strict: Refuse depths that are no multiple instead of rounding down.

    Raises:
        GrowthError: If the target has fewer layers, or (``strict``) no multiple of them.

    Example:
        >>> depth_map(3, 6, "interleave")
        [0, 0, 1, 1, 2, 2]
        >>> depth_map(2, 4, "leading")
        [0, 1, None, None]
    """
    if small > large:
        raise GrowthError(
            f"depth falls from {small} to {large} layers; order the chain from small to large"
        )
    if rule == "leading":
        return [j if j < small else None for j in range(large)]
    if strict and large % small:
        raise GrowthError(
            f"{large} layers are no multiple of {small}; choose a multiple or drop --strict"
        )
    if rule == "stack":
        return [j % small for j in range(large)]
    return [j * small // large for j in range(large)]


def _match_layers(
    small: State, fresh: State, source: Layout, target: Layout, settings: GrowthSettings
) -> dict[str, list[int | None]]:
    # Both models have the same stacks.
    small_depths = _depths(small, source, settings)
    large_depths = _depths(fresh, target, settings)
    missing = set(large_depths) - set(small_depths)
    if missing:
        raise LayoutError(
            f"the small model has no layers {min(missing)}; use two models of one family"
        )

    # Each stack is made deeper by its rule.
    layers: dict[str, list[int | None]] = {}
    for stack, depth in large_depths.items():
        rule = _depth_rule(stack, target, settings)
        layers[stack] = depth_map(small_depths[stack], depth, rule, strict=settings.strict)
        if settings.mode == "lossless" and rule != "identity" and depth > small_depths[stack]:
            raise GrowthError(
                f"lossless growth of {stack} from {small_depths[stack]} to {depth} layers changes the "
                f"outputs with depth {rule}; use depth identity, or mode embed"
            )
    return layers


def _depth_rule(stack: str, target: Layout, settings: GrowthSettings) -> DepthRule:
    """Return the depth rule of one stack.

    The released routine copies layer l of CLIP's own image tower into layers 2 l and 2 l + 1 of a
    tower of twice the depth, and every other tensor under its own name.
    """
    rule = settings.depth_rule
    if rule == "released":
        return "interleave" if stack in target.deepened else "leading"
    return rule


def _depths(state: State, layout: Layout, settings: GrowthSettings) -> dict[str, int]:
    """Return the number of layers of each stack."""
    depths: dict[str, int] = {}
    for name in state:
        layer = None if _may_be_missing(name, settings) else layout.layer_of(name)
        if layer is not None:
            stack, number = layer
            depths[stack] = max(depths.get(stack, 0), number + 1)
    return depths


def _match_parameter(
    name: str,
    target: Layout,
    layers: Mapping[str, Sequence[int | None]],
    settings: GrowthSettings,
) -> Match | None:
    if settings.mode == "random" or _may_be_missing(name, settings):
        return None
    rule, layer = target.rule_of(name), target.layer_of(name)
    if layer is None:
        return Match(name, rule, is_idle=False)

    # With "leading" the layers beyond the small model's have no source.
    stack, number = layer
    source_layers = layers[stack]
    source_layer = source_layers[number]
    if source_layer is None:
        return None

    # With "identity" only the first layer that is grown from a source layer does its work.
    is_copy = number != source_layers.index(source_layer)
    origin = name.replace(f"{stack}.{number}.", f"{stack}.{source_layer}.", 1)
    return Match(origin, rule, is_idle=is_copy and settings.depth_rule == "identity")


def _may_be_missing(name: str, settings: GrowthSettings) -> bool:
    return any(fnmatch(name, pattern) for pattern in settings.allow_missing)
