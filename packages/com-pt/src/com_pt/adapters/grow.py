"""Growth of live models: finds their layouts, and writes the grown weights into the large one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_pt.adapters.layout_llama import is_llama, llama_layout
from com_pt.adapters.layout_open_clip import custom_text_names, is_open_clip, open_clip_layout
from com_pt.adapters.layout_timm import is_timm, timm_layout
from com_pt.errors import GrowthError, LayoutError
from com_pt.growth import Depth, GrowthConfig, GrowthReport, Mode, grow_state
from com_pt.layout import Layout
from effml_common.logging import warn

_known: list[tuple[Callable[[nn.Module], bool], Callable[[Any], Layout]]] = [
    (is_open_clip, open_clip_layout),
    (is_timm, timm_layout),
    (is_llama, llama_layout),
]
HALF = (torch.float16, torch.bfloat16)


def register_layout(
    matches: Callable[[nn.Module], bool], make: Callable[[Any], Layout]
) -> Callable[[Any], Layout]:
    """Teach ``grow`` another architecture; the newest match wins.

    Args:
        matches: Whether a model is of this kind.
        make: The layout of such a model.

    Returns:
        ``make``.
    """
    _known.insert(0, (matches, make))
    return make


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        LayoutError: If its class is not known.
    """
    for matches, make in _known:
        if matches(model):
            return make(model)
    raise LayoutError(
        f"no layout for {type(model).__name__}; use an open_clip CLIP, a timm ViT or Swin or a Llama, "
        "or register_layout"
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, shared ones once."""
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    return {name: value.detach() for name, value in model.named_parameters()} | buffers


@torch.no_grad()
def grow(
    small: nn.Module,
    large: nn.Module,
    mode: Mode = "embed",
    depth: Depth | None = None,
    *,
    layout: Layout | Literal["auto"] = "auto",
    resize_pos: bool = False,
    strict: bool = False,
    seed: int = 0,
    allow_missing: Sequence[str] = (),
) -> GrowthReport:
    """Write a small model's weights into a larger one of its family, in place.

    Args:
        small: The finished model; not changed.
        large: The freshly initialised model; growth is computed on its device.
        mode: ``embed``, ``official``, ``lossless`` or ``random``; see ``GrowthConfig``.
        depth: ``interleave``, ``stack`` or ``identity``.
        layout: Layout of both, if they are of a kind that is not registered.
        resize_pos: Interpolate positions when the image sizes differ.
        strict: Refuse depths that are no multiple of the small one's.
        seed: Of the uneven split of ``lossless``.
        allow_missing: Name patterns that may be missing, and stay fresh.

    Raises:
        LayoutError: If a parameter has no axis roles, or one model lacks it.
        GrowthError: If the models cannot be connected in this mode; says why.
        ChainOrderError: If ``large`` is smaller in some axis.
        NonFiniteWeightsError: If ``small`` holds NaN or infinities.
    """
    config = GrowthConfig(
        mode=mode, depth=depth, strict=strict, seed=seed, allow_missing=allow_missing
    )
    source, target = (layout_of(m) if layout == "auto" else layout for m in (small, large))
    old, fresh = state_of(small), state_of(large)
    for which, state in (("small", old), ("large", fresh)):
        if any(value.is_meta for value in state.values()):
            raise GrowthError(f"the {which} model is on the meta device; load or create its values")
    if any(value.dtype in HALF for value in old.values()):
        warn("the small model's weights are in half precision; they are grown as they are")
    if is_open_clip(small) and is_open_clip(large):
        custom = hasattr(large, "text")
        old = {custom_text_names(name, custom=custom): value for name, value in old.items()}
        source = replace(source, rules=target.rules)
    if resize_pos:
        old, source = _resized(old, fresh, source, target)
    # Everything is computed where the large model is.
    device = next((value.device for value in fresh.values()), torch.device("cpu"))
    old = {name: value.to(device) for name, value in old.items()}
    there = {name: value.to(device) for name, value in fresh.items()}
    grown, report = grow_state(old, there, source, target, config)
    for name, value in fresh.items():
        value.copy_(grown[name])
    scale_eps(large, target, report.eps_factor)
    return report


def scale_eps(model: nn.Module, layout: Layout, factors: dict[str, float]) -> None:
    """Multiply the eps of every norm by its tower's factor; Llama's config learns of it."""
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if any(hasattr(module, attribute) for attribute in ("eps", "variance_epsilon")):
            try:
                rule = layout.rule_of(weight)
            except LayoutError:
                continue
            factor = factors.get(rule.tower, 1.0)
            if rule.kind == "norm" and factor != 1.0:
                attribute = "eps" if hasattr(module, "eps") else "variance_epsilon"
                setattr(module, attribute, getattr(module, attribute) * factor)
    if is_llama(model) and factors.get("", 1.0) != 1.0:
        config: Any = model.config
        config.rms_norm_eps *= factors[""]


def _resized(
    old: dict[str, Tensor], fresh: dict[str, Tensor], source: Layout, target: Layout
) -> tuple[dict[str, Tensor], Layout]:
    """Image positions interpolated to the target's grid; leading tokens (class, register) stay."""
    size = next((name for name in source.fixed if name.endswith("image size")), None)
    if size is None or source.fixed[size] == target.fixed[size]:
        return old, source
    patch = next(value for name, value in target.fixed.items() if name.endswith("patch size"))
    grids = [
        tuple(s // p for s, p in zip(layout.fixed[size], patch, strict=True))
        for layout in (source, target)
    ]
    name = next(n for n in ("visual.positional_embedding", "pos_embed", "visual.trunk.pos_embed")
                if n in old)  # fmt: skip
    table = old[name].reshape(-1, old[name].shape[-1])
    extra = table.shape[0] - grids[0][0] * grids[0][1]
    picture = table[extra:].reshape(1, *grids[0], -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=grids[1], mode="bicubic", antialias=True)
    resized = torch.cat([table[:extra], picture.permute(0, 2, 3, 1).reshape(-1, table.shape[1])])
    old = {**old, name: resized.reshape(*old[name].shape[:-2], *resized.shape)}
    return old, replace(source, fixed={**source.fixed, size: target.fixed[size]})
