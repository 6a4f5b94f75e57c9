"""A transformers causal language model, seen as embedding -> decoder blocks -> head.

Nothing is patched: a block runs with replaced weights through ``torch.func.functional_call``.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from effml_common.errors import InputError

SUPPORTED_MODEL_TYPES = ("llama",)


class UnsupportedArchitectureError(InputError):
    """The model's family has no adapter."""


def check_supported(model_type: str) -> None:
    """Refuse a model family without adapter.

    Raises:
        UnsupportedArchitectureError: Naming what an adapter must know.
    """
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedArchitectureError(
            f"architecture {model_type!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (a new one needs its decoder blocks, its linear "
            "layers and its per-block arguments described in sliderquant/adapters/decoder.py)"
        )


class _BlockInputs(Exception):
    """Carries what block 0 is called with out of the model's own forward pass."""

    def __init__(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.hidden = hidden
        self.kwargs = kwargs


class TransformersDecoder:
    """Decoder view of a model whose ``model.layers`` are called one after the other.

    Args:
        model: A ``*ForCausalLM``; put in eval mode, its parameters frozen.

    Raises:
        UnsupportedArchitectureError: If the family has no adapter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model.config.model_type)
        self.model = model.eval().requires_grad_(False)
        self.blocks: nn.ModuleList = model.model.layers
        self.kwargs: dict[str, Any] | None = None

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @torch.no_grad()
    def block_inputs(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t h"]:
        """Return the hidden states that enter block 0, and keep the arguments all blocks share.

        Without padding the mask is implicit and the rotary tables have batch size one, so the
        arguments of one sample serve any batch of the same length.
        """
        device = self.model.get_input_embeddings().weight.device

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise _BlockInputs(args[0] if args else kwargs.pop("hidden_states"), kwargs)

        hidden = []
        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for sample in tokens.to(device).split(1):
                try:
                    self.model.model(input_ids=sample, use_cache=False)
                except _BlockInputs as caught:
                    hidden.append(caught.hidden)
                    self.kwargs = caught.kwargs
        finally:
            handle.remove()
        return torch.cat(hidden)

    def linear_weights(self, block: int) -> dict[str, Tensor]:
        """Return the weights [out, in] of all linear layers of one block, by parameter name."""
        return {
            f"{name}.weight": module.weight
            for name, module in self.blocks[block].named_modules()
            if isinstance(module, nn.Linear)
        }

    def run_block(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "n t h"]:
        """Run one block, with some of its weights replaced if given.

        Raises:
            RuntimeError: If ``block_inputs`` has not been called before.
        """
        if self.kwargs is None:
            raise RuntimeError("call block_inputs first: it captures the rotary tables")
        return functional_call(self.blocks[block], weights or {}, (hidden,), self.kwargs)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n t v"]:
        """Return the head's logits for the output of the last block."""
        return self.model.lm_head(self.model.model.norm(hidden))
