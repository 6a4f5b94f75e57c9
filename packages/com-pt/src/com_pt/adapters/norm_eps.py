"""The eps of a model's norms, which lossless growth may have to change."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from com_pt.adapters.layout_llama import is_llama
from com_pt.errors import LayoutError
from com_pt.method.layout import Layout


def scale_eps(model: nn.Module, layout: Layout, factors: Mapping[str, float]) -> None:
    """Multiply the eps of every norm by its tower's factor, in place.

    Args:
        model: Its norms have an attribute ``eps`` or ``variance_epsilon``.
        layout: Says which parameters belong to norms, and to which tower.
        factors: For each tower its factor; 1 where none is given.
    """
    for name, module in model.named_modules():
        attribute = next((a for a in ("eps", "variance_epsilon") if hasattr(module, a)), None)
        if attribute is None:
            continue

        # What the layout does not know was not grown either.
        try:
            rule = layout.rule_of(f"{name}.weight")
        except LayoutError:
            continue
        factor = factors.get(rule.tower, 1.0)
        if rule.kind == "norm" and factor != 1.0:
            setattr(module, attribute, getattr(module, attribute) * factor)

    # A Llama is saved with the eps of its config.
    if is_llama(model) and factors.get("", 1.0) != 1.0:
        config: Any = model.config
        config.rms_norm_eps *= factors[""]
