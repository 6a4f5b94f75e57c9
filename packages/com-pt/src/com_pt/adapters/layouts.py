"""The layouts that ``grow`` knows: for each kind of model a test of it, and its description."""

from collections.abc import Callable
from typing import Any

from torch import nn

from com_pt.adapters.layout_llama import is_llama, llama_layout
from com_pt.adapters.layout_open_clip import is_open_clip, open_clip_layout
from com_pt.adapters.layout_timm import is_timm, timm_layout
from com_pt.errors import LayoutError
from com_pt.method.layout import Layout

_KINDS: list[tuple[Callable[[nn.Module], bool], Callable[[Any], Layout]]] = [
    (is_open_clip, open_clip_layout),
    (is_timm, timm_layout),
    (is_llama, llama_layout),
]


def register_layout(
    matches: Callable[[nn.Module], bool], make: Callable[[Any], Layout]
) -> Callable[[Any], Layout]:
    """Teach ``grow`` another architecture; the newest match wins.

    Args:
        matches: Whether a model is of this kind.
        make: The layout of such a model.

    Returns:
        ``make``.

    Example:
        >>> from com_pt.method.layout import Tower, rules
        >>> class Perceptron(nn.Sequential): ...
        >>> def make_layout(model):
        ...     table = rules({"0.weight": "MLP FIXED", "1.weight": "FIXED <MLP"})
        ...     return Layout("perceptron", table, {"": Tower(width=8, head_dim=1, heads=1)})
        >>> _ = register_layout(lambda model: isinstance(model, Perceptron), make_layout)
        >>> layout_of(Perceptron()).name
        'perceptron'
    """
    _KINDS.insert(0, (matches, make))
    return make


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a model.

    Raises:
        LayoutError: If its class is not known.
    """
    for matches, make in _KINDS:
        if matches(model):
            return make(model)
    raise LayoutError(
        f"no layout for {type(model).__name__}; use an open_clip CLIP, a timm ViT or Swin or a Llama, "
        "or register_layout"
    )
