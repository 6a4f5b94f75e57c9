"""The sizes of a model that cost and formats depend on, read without touching a weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effml_common.errors import ConfigError, InputError
from sliderquant.config import FULL_BITS, SliderConfig

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
        linears: Shape [out, in] or [experts, out, in] of each quantized weight of block 0, by name.
        blocks: The same for every block.
        embedding: Weights of the embedding.
        context: Longest sequence, in tokens.
    """

    layers: int
    hidden: int
    linears: dict[str, tuple[int, ...]]
    blocks: tuple[dict[str, tuple[int, ...]], ...]
    embedding: int
    context: int


def model_shape(directory: str) -> ModelShape:
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
    blocks = []
    for block in range(decoder.depth):
        shapes = decoder.shapes(block)
        blocks.append({name: tuple(shapes[name]) for name in decoder.layout(block).linears})
    embedding: Any = decoder.model.get_input_embeddings()
    return ModelShape(
        layers=decoder.depth,
        hidden=config.hidden_size,
        linears=blocks[0],
        blocks=tuple(blocks),
        embedding=embedding.weight.numel(),
        context=config.max_position_embeddings,
    )


def check_linears(linears: dict[str, tuple[int, ...]], config: SliderConfig) -> None:
    """Refuse settings that some weight of a block does not allow.

    Args:
        linears: Shape of each weight that is rounded, by name; fused experts have three axes.
        config: Method and storage format.

    Raises:
        ConfigError: If compensated rounding is asked for and the model has fused experts.
        ShapeError: If the group size does not divide some layer.
    """
    fused = [name for name, shape in linears.items() if len(shape) > 2]
    rounds = config.wbits != FULL_BITS or config.has_mixed_bits
    if fused and config.method != "slider" and rounds:
        raise ConfigError(
            f"fused experts ({', '.join(fused)}) cannot be rounded with compensation; "
            "add --method slider"
        )
    check_group_size(linears, config.group_size)


def check_group_size(linears: dict[str, tuple[int, ...]], group_size: int | None) -> None:
    """Refuse a group size that leaves a remainder in some layer.

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
