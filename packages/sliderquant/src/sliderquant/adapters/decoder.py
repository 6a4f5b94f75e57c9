"""A transformers causal language model, seen as embedding -> decoder blocks -> head.

Nothing is patched: a block runs with replaced parameters through ``torch.func.functional_call``. Where
the parameters come from is the source's affair: the model itself, or its files, block by block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from sliderquant.adapters.families import (
    UnsupportedArchitectureError as UnsupportedArchitectureError,
)
from sliderquant.adapters.families import block_layout, family_of
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.layout import BlockLayout
from sliderquant.method.sampling import to_device


class ParameterSource(Protocol):
    """Where parameters come from."""

    device: torch.device

    def block(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of a block, by name inside the block, on the computing device."""
        ...

    def outside(self, head: bool = True) -> dict[str, Tensor]:
        """Return embedding, final norm and (if asked) head, by their names in the model."""
        ...


class ModelParameters:
    """The parameters of a model that is in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device: torch.device = next(model.parameters()).device

    def block(self, block: int) -> dict[str, Tensor]:
        """Return the model's own tensors, not copies."""
        return {n: p.detach() for n, p in self._model.model.layers[block].named_parameters()}

    def outside(self, head: bool = True) -> dict[str, Tensor]:
        """Return the model's own tensors, not copies."""
        return {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if not name.startswith("model.layers.") and (head or name != "lm_head.weight")
        }


class _BlockInputs(Exception):
    """Carries what block 0 is called with out of the model's own forward pass."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StopForward(Exception):
    """Ends the pass through a block."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps the arguments it is called with, and ends the pass at the last."""

    def __init__(self, original: nn.Module, number: int, calls: dict[int, Any], last: bool) -> None:
        super().__init__()
        self.number, self.calls, self.last = number, calls, last
        for name in ("attention_type", "layer_type"):  # some models ask a block for its kind
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls[self.number] = (args, kwargs)
        if self.last:
            raise _BlockInputs(hidden_states)
        return hidden_states


class _GivenHiddenStates(nn.Module):
    """Stands in for all blocks: returns given hidden states."""

    def __init__(self, original: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        for name in ("attention_type", "layer_type"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class TransformersDecoder:
    """Decoder view of a model whose ``model.layers`` are called one after the other.

    Args:
        model: A ``*ForCausalLM``; put in eval mode, its parameters frozen. They may be on the meta
            device if ``source`` provides them.
        source: Where parameters come from; default the model itself.

    Raises:
        UnsupportedArchitectureError: If the family is not in the table, or a block is not built as its
            entry says.
    """

    def __init__(self, model: PreTrainedModel, source: ParameterSource | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.source: ParameterSource = source or ModelParameters(model)

        # What blocks need beside their parameters, and which parameters are in memory.
        self._calls: dict[int, Any] = {}
        self._held: dict[int, dict[str, Tensor]] = {}
        self._keep: frozenset[int] = frozenset()

        # The roles of each block's parameters follow from the family and their shapes.
        family_of(model.config.model_type)  # raises before anything is taken to be where it says
        self.blocks: nn.ModuleList = model.model.layers
        shapes = [self.shapes(block) for block in range(self.depth)]
        self._layouts = [block_layout(model.config, of_block) for of_block in shapes]

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self.source.device

    def layout(self, block: int) -> BlockLayout:
        """Return the roles of a block's parameters."""
        return self._layouts[block]

    def shapes(self, block: int) -> dict[str, torch.Size]:
        """Return the shapes of all parameters of one block by name; no weight is read."""
        return {name: p.shape for name, p in self.blocks[block].named_parameters()}

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep these blocks' parameters in memory once they have been read, and drop all others."""
        self._keep = frozenset(blocks)
        self._held = {block: t for block, t in self._held.items() if block in self._keep}

    def tensors(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of one block by name."""
        if block in self._held:
            return self._held[block]
        tensors = self.source.block(block)
        if block in self._keep:
            self._held[block] = tensors
        return tensors

    def linear_weights(self, block: int) -> dict[str, Tensor]:
        """Return the weights to quantize, [out, in] or [experts, out, in], by parameter name."""
        tensors = self.tensors(block)
        return {name: tensors[name] for name in self.layout(block).linears}

    @torch.no_grad()
    def block_inputs(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t h"]:
        """Return the hidden states that enter block 0, and keep the arguments of every block.

        Masks and rotary tables differ between kinds of blocks (sliding window, local rotary base).
        Without padding they have batch size one, so those of one sample serve any batch of its length.
        """
        outside = self.source.outside(head=False)
        last = self.depth - 1
        recorders = nn.ModuleList(
            _Recorder(block, number, self._calls, number == last)
            for number, block in enumerate(self.blocks)
        )
        hidden = []
        with self._instead_of_blocks(recorders):
            for sample in tokens.to(self.device).split(1):
                try:
                    self._whole_model(outside, input_ids=sample)
                except _BlockInputs as caught:
                    hidden.append(caught.hidden)
        return torch.cat(hidden)

    @contextmanager
    def _instead_of_blocks(self, modules: nn.ModuleList) -> Iterator[None]:
        self.model.model.layers = modules
        try:
            yield
        finally:
            self.model.model.layers = self.blocks

    def run_block(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor] | None = None,
        activations: ActivationFormat | None = None,
    ) -> Float[Tensor, "n t h"]:
        """Run one block, with some of its parameters replaced and its activations rounded if given.

        Raises:
            RuntimeError: If ``block_inputs`` has not been called before.
        """
        if block not in self._calls:
            raise RuntimeError("call block_inputs first: it captures masks and rotary tables")
        args, kwargs = self._calls[block]
        hidden = to_device(hidden, self.device)
        module = self.blocks[block]
        parameters = weights or {}
        if len(parameters) < sum(1 for _ in module.parameters()):
            parameters = self.tensors(block) | parameters
        if activations is None:
            return functional_call(module, parameters, (hidden, *args), kwargs)
        with ActivationRounding([module], self.model.config, activations, first=block):
            return functional_call(module, parameters, (hidden, *args), kwargs)

    def inputs_inside(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor],
        modules: Sequence[str],
        activations: ActivationFormat | None = None,
        attention: Float[Tensor, "n t h"] | None = None,
    ) -> dict[str, Tensor]:
        """Return what modules of a block are called with, not rounded yet; it runs no further than that.

        Args:
            block: Its number.
            hidden: Hidden states that enter it.
            weights: Parameters to use instead of its own.
            modules: Names inside the block; the empty name asks for what the block returns.
            activations: Rounding of activations on the way.
            attention: What the attention returns, instead of computing it.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]
            if len(seen) == len(modules):
                raise _StopForward

        handles = [
            self.blocks[block].get_submodule(name).register_forward_pre_hook(partial(keep, name))
            for name in modules
            if name
        ]
        try:
            with self._given_attention(block, attention):
                seen[""] = self.run_block(block, hidden, weights, activations)
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def expert_inputs(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor],
        activations: ActivationFormat | None = None,
        attention: Float[Tensor, "n t h"] | None = None,
    ) -> tuple[Float[Tensor, "tokens h"], Int[Tensor, "tokens k"]]:
        """Return what a block's experts read, not rounded yet, and which of them each token goes to.

        The arguments are those of ``inputs_inside``.
        """
        chosen: list[Tensor] = []
        mlp: Any = self.blocks[block].mlp
        handle = mlp.gate.register_forward_hook(
            lambda _module, _args, output: chosen.append(output[-1])
        )
        try:
            seen = self.inputs_inside(
                block, hidden, weights, ["mlp.experts"], activations, attention
            )
        finally:
            handle.remove()
        return seen["mlp.experts"], chosen[0]

    def gate_experts(
        self, block: int, product: Float[Tensor, "n rows"]
    ) -> Float[Tensor, "n inner"]:
        """Return what an expert makes of the product with its gate and up projection."""
        mlp: Any = self.blocks[block].mlp
        return mlp.experts._apply_gate(product)

    @contextmanager
    def _given_attention(self, block: int, attention: Tensor | None) -> Iterator[None]:
        """Let the attention of a block return a given tensor; ``None`` leaves it as it is."""
        if attention is None:
            yield
            return
        # The module of which the output projection is a part; its parameters stay where they are.
        name, *_ = self.layout(block).outputs[0].rsplit(".", 2)
        module = self.blocks[block].get_submodule(name)
        object.__setattr__(module, "forward", lambda *_, **__: (attention, None))
        try:
            yield
        finally:
            object.__delattr__(module, "forward")

    @contextmanager
    def counting_experts(self) -> Iterator[dict[int, Tensor]]:
        """Count the tokens that each expert receives, by block, while the context is open."""
        counts: dict[int, Tensor] = {}

        def count(block: int, experts: int) -> Any:
            counts[block] = torch.zeros(experts, dtype=torch.int64)

            def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
                chosen = output[-1].flatten().cpu()
                counts[block] += torch.bincount(chosen, minlength=experts)

            return hook

        mlps: list[Any] = [module.mlp for module in self.blocks]
        handles = [
            mlp.gate.register_forward_hook(count(number, mlp.experts.num_experts))
            for number, mlp in enumerate(mlps)
            if hasattr(mlp, "experts")
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()
            for block in [b for b, seen in counts.items() if not seen.any()]:
                del counts[block]

    def outside(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head, by their names in the model."""
        return self.source.outside()

    @torch.no_grad()
    def logits(
        self, hidden: Float[Tensor, "n t h"], outside: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "n t v"]:
        """Return the model's logits for the output of the last block.

        Args:
            hidden: Output of the last block.
            outside: Embedding, norm and head, to read them once for many calls.
        """
        outside = outside or self.source.outside()
        hidden = to_device(hidden, self.device)
        stand_ins = nn.ModuleList(_GivenHiddenStates(block, hidden) for block in self.blocks)
        with self._instead_of_blocks(stand_ins):
            return self._whole_model(outside, inputs_embeds=hidden).logits

    def _whole_model(self, outside: dict[str, Tensor], **inputs: Tensor) -> Any:
        # Given by name, also where the model ties embedding and head: a rotation unties them.
        kwargs = {**inputs, "use_cache": False}
        return functional_call(self.model, outside, kwargs=kwargs, tie_weights=False)
