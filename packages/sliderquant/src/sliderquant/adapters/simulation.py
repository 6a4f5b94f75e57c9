"""The quantized model before it is stored: simulated parameters, logits, perplexities, codes."""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sliderquant.adapters.layer_bits import block_formats, layer_bits
from sliderquant.adapters.layer_bits import weight_format as weight_format
from sliderquant.adapters.shapes import check_linears
from sliderquant.config import FULL_BITS, SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.decoder import Decoder
from sliderquant.method.layout import COLUMNS, ScalingSite
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.sampling import seeded

BlockWeights = Sequence[dict[str, Tensor]]
# Parameters of a block to use instead of the model's own; ``None`` for the model's own.
Replacement = Callable[[int], dict[str, Tensor] | None]


def fresh_learnables(
    decoder: Decoder, config: SliderConfig, dtype: torch.dtype
) -> list[BlockLearnables]:
    """Return untrained learnables for every block; reads no weight.

    Those of windows are on the model's device. Compensated rounding only reads the channel scales:
    corrections and clipping of all blocks stay in the host's memory.

    Raises:
        ConfigError: If a pattern of the settings fits no layer.
        ShapeError: If the group size does not divide some layer.
    """
    fmt = weight_format(config, dtype)
    bits = layer_bits(config, [decoder.layout(block).linears for block in range(decoder.depth)])
    learnables = []
    for block in range(decoder.depth):
        # The shapes say all that is needed, so no weight is read.
        layout = decoder.layout(block)
        shapes = decoder.shapes(block)
        linears = {name: tuple(shapes[name]) for name in layout.linears}
        formats = block_formats(config, bits[block], dtype) if config.has_mixed_bits else {}
        ignored = {name for name, own in formats.items() if own.bits == FULL_BITS}
        check_linears({n: shape for n, shape in linears.items() if n not in ignored}, config)
        weights = {name: torch.empty(shape, device="meta") for name, shape in linears.items()}

        # The initial values depend on seed and block alone.
        sites = layout.sites if config.scales_channels else ()
        sites = [site for site in sites if _serves_rounding(site, ignored)]
        generator = seeded((config.seed, block))
        block_learnables = BlockLearnables(
            weights,
            fmt,
            config.lora_rank,
            generator,
            sites,
            config.lwc,
            formats=formats,
            dtype=dtype,
        )
        compensated = config.method == "compensated"
        trained = block_learnables.factors if compensated else block_learnables
        trained.to(decoder.device)
        learnables.append(block_learnables)
    return learnables


def _serves_rounding(site: ScalingSite, ignored: Collection[str]) -> bool:
    """Return whether a scaling helps a weight that is rounded: one that reads it, if any does."""
    changed = [p for p in site.parameters if p.axis == COLUMNS] or site.parameters
    return not ignored or any(parameter.name not in ignored for parameter in changed)


@torch.no_grad()
def simulated_weights(
    decoder: Decoder, learnables: Sequence[BlockLearnables]
) -> list[dict[str, Tensor]]:
    """Return the changed parameters of every block, dequantized: what a merged model holds."""
    return [learnables[block](decoder.tensors(block)) for block in range(decoder.depth)]


def model_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens to the logits of a transformers model, without cache."""
    return lambda tokens: model(input_ids=tokens.to(model.device), use_cache=False).logits


def simulated_logits(
    decoder: Decoder,
    weights: BlockWeights | None,
    activations: ActivationFormat | None = None,
) -> Callable[[Int[Tensor, "b t"]], Float[Tensor, "b t v"]]:
    """Return a function from tokens to logits with replaced weights; ``None`` for the model's own."""

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        hidden = decoder.block_inputs(tokens)
        for block in range(decoder.depth):
            replaced = weights[block] if weights else None
            hidden = decoder.run_block(block, hidden, replaced, activations)
        return decoder.logits(hidden)

    return logits


@torch.no_grad()
def merge_(decoder: Decoder, weights: BlockWeights) -> None:
    """Copy simulated parameters into a model in memory, in place."""
    for block, replaced in enumerate(weights):
        tensors = decoder.tensors(block)
        for name, weight in replaced.items():
            tensors[name].copy_(weight)
