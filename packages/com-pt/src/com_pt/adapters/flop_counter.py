"""MACs by torch's counter on the meta device, for models without a formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree


def count_macs(
    build: Callable[[], nn.Module], call: Callable[[nn.Module, Any], Any], batch: Any
) -> int:
    """Count the forward MACs of ``call(model, batch)``, without weights or work.

    The model is in train mode, because attention's fast path of eval mode is not counted; batch norms
    are not, because they refuse a batch of one.

    Args:
        build: Makes the model.
        call: Runs its forward pass.
        batch: Tensors whose shapes matter, in tuples, lists or dicts.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build().train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    on_meta = _pytree.tree_map(lambda t: t.to("meta"), batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, on_meta)
    return counter.get_total_flops() // 2
