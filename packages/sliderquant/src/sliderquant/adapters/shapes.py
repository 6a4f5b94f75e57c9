"""The sizes of a model that cost and formats depend on, read without touching a weight."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effml_common.errors import InputError
from sliderquant.config import SliderConfig

if TYPE_CHECKING:
    from sliderquant.adapters.decoder import TransformersDecoder


class ShapeError(InputError):
    """A weight's shape does not fit the requested format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a model that cost depends on.

    Attributes:
        layers: Decoder blocks.
        hidden: Width of the hidden state.
        blocks: For each block, the shape [out, in] or [experts, out, in] of each quantized weight, by
            name. Blocks may differ: some are dense in models with experts.
        embedding: Weights of the embedding.
        context: Longest sequence, in tokens.
    """

    layers: int
    hidden: int
    blocks: tuple[dict[str, tuple[int, ...]], ...]
    embedding: int
    context: int

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the quantized weights of all blocks, by their names in the stack of blocks."""
        return {
            f"{block}.{name}": shape
            for block, linears in enumerate(self.blocks)
            for name, shape in linears.items()
        }

    def kinds(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the weights of a block of each kind, in order: the same names and shapes are a kind."""
        kinds: list[dict[str, tuple[int, ...]]] = []
        for linears in self.blocks:
            if linears not in kinds:
                kinds.append(linears)
        return kinds

    def weights(self) -> list[int]:
        """Return the number of quantized weights of every block."""
        return [sum(map(math.prod, linears.values())) for linears in self.blocks]


def model_shape(directory: str | Path) -> ModelShape:
    """Read the sizes of a model directory from its ``config.json``; no weight is touched.

    Raises:
        InputError: If the directory is no supported model.
    """
    from sliderquant.adapters.decoder import TransformersDecoder
    from sliderquant.adapters.files import load_config
    from sliderquant.adapters.streaming import empty_model

    return decoder_shape(TransformersDecoder(empty_model(load_config(directory))))


def decoder_shape(decoder: "TransformersDecoder") -> ModelShape:
    """Return the sizes of a model; its parameters may be on the meta device."""
    config = decoder.model.config
    shapes = [decoder.shapes(block) for block in range(decoder.depth)]
    embedding: Any = decoder.model.get_input_embeddings()
    return ModelShape(
        layers=decoder.depth,
        hidden=config.hidden_size,
        blocks=tuple(
            {name: tuple(of_block[name]) for name in decoder.layout(block).linears}
            for block, of_block in enumerate(shapes)
        ),
        embedding=embedding.weight.numel(),
        context=config.max_position_embeddings,
    )


def check_linears(linears: dict[str, tuple[int, ...]], config: SliderConfig) -> None:
    """Refuse settings that some weight of a block does not allow.

    Args:
        linears: Shape of each weight that is rounded, by name; fused experts have three axes.
        config: Method and storage format.

    Raises:
        ShapeError: If the group size does not divide some layer.
    """
    check_group_size(linears, config.columns_per_scale)


def check_group_size(linears: dict[str, tuple[int, ...]], group_size: int | None) -> None:
    """Refuse a group size that leaves a remainder in some layer.

    Args:
        linears: Shape of each quantized weight, by name.
        group_size: Input columns per group, or ``None``.

    Raises:
        ShapeError: Listing the layers.
    """
    misfits = [
        f"{name} ({shape[-1]} columns)"
        for name, shape in linears.items()
        if group_size and shape[-1] % group_size
    ]
    if misfits:
        raise ShapeError(
            f"group_size {group_size} does not divide {', '.join(misfits)}; "
            "choose a divisor, or none for one scale per row"
        )
