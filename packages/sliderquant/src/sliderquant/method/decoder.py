"""What calibration sees of a language model, and hidden states on their way through its blocks.

No host library is needed here; ``adapters`` implement ``Decoder``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.method.activations import ActivationFormat
from sliderquant.method.layout import BlockLayout
from sliderquant.method.learnables import BlockLearnables

# Given a name and hidden states, returns a copy of them that may live on disk.
HiddenStateCache = Callable[[str, Tensor], Tensor]


class Decoder(Protocol):
    """A language model as embedding -> decoder blocks -> head."""

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        ...

    def shapes(self, block: int) -> dict[str, torch.Size]:
        """Return the shapes of all parameters of one block by name; no weight is read."""
        ...

    def block_inputs(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t h"]:
        """Return the hidden states that enter block 0."""
        ...

    def layout(self, block: int) -> BlockLayout:
        """Return the roles of a block's parameters."""
        ...

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep these blocks' parameters in memory from now on, and no others."""
        ...

    def tensors(self, block: int) -> dict[str, Tensor]:
        """Return all parameters of one block by name."""
        ...

    def linear_weights(self, block: int) -> dict[str, Tensor]:
        """Return the weights to quantize, [out, in] or [experts, out, in], by parameter name."""
        ...

    def run_block(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor] | None = None,
        activations: ActivationFormat | None = None,
    ) -> Float[Tensor, "n t h"]:
        """Run one block, with some parameters replaced and activations rounded if given."""
        ...

    def inputs_inside(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor],
        modules: Sequence[str],
        activations: ActivationFormat | None = None,
        attention: Float[Tensor, "n t h"] | None = None,
    ) -> dict[str, Tensor]:
        """Return what modules of a block are called with, before rounding; "" is what it returns.

        ``attention``, if given, is taken for what the attention returns, which then is not computed.
        """
        ...

    def expert_inputs(
        self,
        block: int,
        hidden: Float[Tensor, "n t h"],
        weights: dict[str, Tensor],
        activations: ActivationFormat | None = None,
        attention: Float[Tensor, "n t h"] | None = None,
    ) -> tuple[Float[Tensor, "tokens h"], Int[Tensor, "tokens k"]]:
        """Return what a block's experts read, before rounding, and which of them each token goes to."""
        ...

    def gate_experts(
        self, block: int, product: Float[Tensor, "n rows"]
    ) -> Float[Tensor, "n inner"]:
        """Return what an expert makes of the product with its gate and up projection."""
        ...

    def counting_experts(self) -> AbstractContextManager[dict[int, Tensor]]:
        """Count the tokens that each expert receives, by block, while the context is open."""
        ...

    def outside(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head, by their names in the model."""
        ...

    def logits(
        self, hidden: Float[Tensor, "n t h"], outside: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "n t v"]:
        """Return the logits for the output of the last block; ``outside`` saves reading the head."""
        ...


@torch.no_grad()
def run_blocks(
    decoder: Decoder,
    blocks: Sequence[int],
    hidden: Float[Tensor, "n t h"],
    batch_size: int,
    learnables: Sequence[BlockLearnables] | None = None,
    ratio: float = 1.0,
    activations: ActivationFormat | None = None,
    out: Float[Tensor, "n t h"] | None = None,
) -> Float[Tensor, "n t h"]:
    """Push hidden states through blocks, in full precision or simulated.

    Args:
        decoder: The model.
        blocks: Block numbers, in order.
        hidden: Hidden states entering the first block.
        batch_size: Samples per forward pass. The same value gives the same bits again.
        learnables: Of all blocks, for the simulated model; ``None`` for full precision.
        ratio: Intra-layer ratio of the simulation.
        activations: Rounding of activations in the simulation.
        out: Where to put the result; ``hidden`` itself makes it an update in place.

    Returns:
        ``out``, or a new tensor.
    """
    if out is None:
        out = torch.empty_like(hidden)
    if out is not hidden:
        out.copy_(hidden)

    for block in blocks:
        tensors = decoder.tensors(block)
        if learnables is not None:
            tensors = tensors | learnables[block](tensors, ratio)
        for batch in out.split(batch_size):
            batch.copy_(decoder.run_block(block, batch, tensors, activations))
    return out
