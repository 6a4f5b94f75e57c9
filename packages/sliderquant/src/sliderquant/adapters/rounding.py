"""Activation rounding inside an unmodified transformers model, undone by one handle.

Linear inputs are rounded by forward pre-hooks; queries, keys and values after the rotary embedding by an
attention function of our own around the model's; inputs of fused experts by an experts function.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sliderquant.method.activations import ActivationFormat, fake_quantize_tokens
from sliderquant.method.packed import PackedLinear

PREFIX = "sliderquant_"


class ActivationRounding:
    """Rounds activations of blocks until it is removed; also a context manager.

    Args:
        blocks: Decoder blocks, or modules that hold them.
        config: The model's config; its attention and experts functions are exchanged.
        fmt: Grid.
        first: Number of the first block.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        config: PreTrainedConfig,
        fmt: ActivationFormat,
        first: int = 0,
    ) -> None:
        # What ``remove`` puts back.
        self._config = config
        self._attention: Any = config._attn_implementation
        self._experts = getattr(config, "_experts_implementation", None)
        self._hooks = [
            module.register_forward_pre_hook(partial(_round_input, fmt))
            for number, block in enumerate(blocks, start=first)
            for name, module in block.named_modules(prefix=f"layers.{number}")
            if isinstance(module, nn.Linear | PackedLinear) and name not in fmt.exact_inputs
        ]

        # Attention and experts are functions that the config names, one for each grid.
        if fmt.attention:
            config._attn_implementation = _register_attention(self._attention, fmt)
        if self._experts is not None:
            config._experts_implementation = _register_experts(fmt)

    def remove(self) -> None:
        """Leave model and config as they were."""
        for hook in self._hooks:
            hook.remove()
        self._config._attn_implementation = self._attention
        if self._experts is not None:
            self._config._experts_implementation = self._experts

    def __enter__(self) -> "ActivationRounding":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _round_input(fmt: ActivationFormat, _module: nn.Module, args: tuple[Any, ...]) -> Any:
    return (fake_quantize_tokens(args[0], fmt), *args[1:])


def _grid_name(fmt: ActivationFormat) -> str:
    """Return the grid as a part of a name: models with different grids may be in use at once."""
    return f"{fmt.bits}_{'sym' if fmt.sym else 'asym'}_{fmt.ratio:g}"


def _register_attention(base: str, fmt: ActivationFormat) -> str:
    """Register attention with rounded inputs around ``base``, with the masks that ``base`` gets."""
    name = f"{PREFIX}{base}_{_grid_name(fmt)}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_rounded_attention, base, fmt))
        # Without a mask function of this name the model would pass no mask at all.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _register_experts(fmt: ActivationFormat) -> str:
    """Register fused experts with rounded inputs."""
    name = f"{PREFIX}experts_{_grid_name(fmt)}"
    if name not in ALL_EXPERTS_FUNCTIONS:

        def experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return _rounded_experts(self, fmt, hidden, index, weights)

        ALL_EXPERTS_FUNCTIONS.register(name, experts)
    return name


def _rounded_attention(
    base: str,
    fmt: ActivationFormat,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    query, key, value = (fake_quantize_tokens(x, fmt) for x in (query, key, value))
    # The eager function belongs to each model's own file.
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    run = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    return run(module, query, key, value, *args, **kwargs)


def _rounded_experts(
    self: Any, fmt: ActivationFormat, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Fused experts one after the other, with the inputs of both products rounded per token."""
    result = torch.zeros_like(hidden)
    rounded = fake_quantize_tokens(hidden, fmt)
    for expert in top_k_index.unique().tolist():
        # The tokens of this expert go through its two products.
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        inner = self._apply_gate(nn.functional.linear(rounded[token], self.gate_up_proj[expert]))
        inner = fake_quantize_tokens(inner, fmt)
        out = nn.functional.linear(inner, self.down_proj[expert])

        # Each token adds the results of its experts, weighted by the router.
        weighted = out * top_k_weights[token, place, None].to(out.dtype)
        result = result.index_add(0, token, weighted.to(result.dtype))
    return result
