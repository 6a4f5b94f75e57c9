"""Growth of live models: finds their layouts, and writes the grown weights into the large one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_pt.adapters.layout_open_clip import custom_text_names, is_open_clip
from com_pt.adapters.layouts import layout_of
from com_pt.adapters.norm_eps import scale_eps
from com_pt.errors import GrowthError
from com_pt.method.growth import GrowthReport, grow_state
from com_pt.method.layout import Layout
from com_pt.method_config import DepthRule, GrowthMode, GrowthSettings
from effml_common.logging import warn

HALF_PRECISION = (torch.float16, torch.bfloat16)
IMAGE_POSITIONS = ("visual.positional_embedding", "pos_embed", "visual.trunk.pos_embed")


@torch.no_grad()
def grow(
    small: nn.Module,
    large: nn.Module,
    mode: GrowthMode = "embed",
    depth: DepthRule | None = None,
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
        mode: ``embed``, ``official``, ``lossless`` or ``random``; see ``GrowthSettings``.
        depth: ``interleave``, ``stack``, ``identity`` or ``leading``; see ``GrowthSettings``.
        layout: Layout of both, if they are of a kind that is not registered.
        resize_pos: Interpolate positions when the image sizes differ.
        strict: Refuse depths that are no multiple of the small one's.
        seed: The seed of the uneven split of ``lossless``.
        allow_missing: Name patterns that may be missing, and stay fresh.

    Raises:
        LayoutError: If a parameter has no axis roles, or one model lacks it.
        GrowthError: If the models cannot be connected in this mode; says why.
        ChainOrderError: If ``large`` is smaller in some axis.
        NonFiniteWeightsError: If ``small`` holds NaN or infinities.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> sizes = dict(img_size=8, patch_size=4, num_classes=3, depth=1)
        >>> small = VisionTransformer(embed_dim=16, num_heads=1, **sizes).eval()
        >>> large = VisionTransformer(embed_dim=32, num_heads=2, **sizes).eval()
        >>> report = grow(small, large, mode="lossless")
        >>> image = torch.ones(1, 3, 8, 8)
        >>> bool(torch.allclose(small(image), large(image), atol=1e-5))
        True
    """
    # Read both models: their layouts, and their weights under the same names.
    settings = GrowthSettings(
        mode=mode, depth=depth, strict=strict, seed=seed, allow_missing=allow_missing
    )
    source, target = (layout_of(m) if layout == "auto" else layout for m in (small, large))
    weights, fresh = state_of(small), state_of(large)
    _check_values(weights, fresh)
    if is_open_clip(small) and is_open_clip(large):
        custom = hasattr(large, "text")
        weights = {custom_text_names(name, custom=custom): v for name, v in weights.items()}
        source = replace(source, rules=target.rules)
    if resize_pos:
        weights, source = _resize_positions(weights, source, target)

    # Everything is computed where the large model is.
    device = next((value.device for value in fresh.values()), torch.device("cpu"))
    weights = {name: value.to(device) for name, value in weights.items()}
    fresh_there = {name: value.to(device) for name, value in fresh.items()}
    grown, report = grow_state(weights, fresh_there, source, target, settings)

    # Nothing is written before all of it is known.
    for name, value in fresh.items():
        value.copy_(grown[name])
    scale_eps(large, target, report.eps_factor)
    return report


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name, shared ones once."""
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    return {name: value.detach() for name, value in model.named_parameters()} | buffers


def _check_values(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> None:
    for which, state in (("small", weights), ("large", fresh)):
        if any(value.is_meta for value in state.values()):
            raise GrowthError(f"the {which} model is on the meta device; load or create its values")
    if any(value.dtype in HALF_PRECISION for value in weights.values()):
        warn("the small model's weights are in half precision; they are grown as they are")


def _resize_positions(
    weights: dict[str, Tensor], source: Layout, target: Layout
) -> tuple[dict[str, Tensor], Layout]:
    """Interpolate image positions to the target's grid; leading tokens (class, register) stay."""
    size = next((name for name in source.fixed if name.endswith("image size")), None)
    if size is None or source.fixed[size] == target.fixed[size]:
        return weights, source

    # Patches in both directions, before and after.
    patch = next(value for name, value in target.fixed.items() if name.endswith("patch size"))
    small_grid, large_grid = (
        tuple(s // p for s, p in zip(layout.fixed[size], patch, strict=True))
        for layout in (source, target)
    )

    # Interpolate the table as a picture [1, width, rows, columns].
    name = next(name for name in IMAGE_POSITIONS if name in weights)
    table = weights[name].reshape(-1, weights[name].shape[-1])
    leading = table.shape[0] - small_grid[0] * small_grid[1]
    picture = table[leading:].reshape(1, *small_grid, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=large_grid, mode="bicubic", antialias=True)
    positions = picture.permute(0, 2, 3, 1).reshape(-1, table.shape[1])
    resized = torch.cat([table[:leading], positions])

    weights = {**weights, name: resized.reshape(*weights[name].shape[:-2], *resized.shape)}
    return weights, replace(source, fixed={**source.fixed, size: target.fixed[size]})
