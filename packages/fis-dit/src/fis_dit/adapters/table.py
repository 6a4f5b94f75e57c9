"""What fis-dit must know of a transformer class, and the table of classes it knows.

An adapter is data: names of modules and arguments, and a few small functions. ``register_adapter`` adds
one for a class of your own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from fis_dit.cost import BlockShape
from fis_dit.errors import UnsupportedModelError

Geometry = tuple[int, int, int]  # latent frames F, height and width in tokens


class ReadGeometry(Protocol):
    """Reads (F, H, W) off the arguments of the probed module."""

    def __call__(
        self, config: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Geometry:
        """From the transformer's config and the probe's arguments."""
        ...


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """An argument with one entry per video token, gathered with the frames.

    Attributes:
        dim: Of the tokens; tensors in a tuple share it.
        ndim: Only tensors of this many dimensions are per token (None: all, and they must be).
    """

    dim: int
    ndim: int | None = None


@dataclass(frozen=True, kw_only=True)
class FISAdapter:
    """How one transformer class is laid out.

    Attributes:
        blocks: Attribute that holds the list of blocks.
        probe: Child that runs once per forward, before the blocks, and sees the video's shape.
        geometry: Reads (F, H, W) from the probe's arguments.
        block_arguments: Names of a block's positional arguments; the first is the video tokens.
        per_token: Which of them hold one entry per token, besides the first.
        attention: Name of a block's self-attention.
        attention_arguments: Names of its positional arguments; the first is the video tokens.
        attention_per_token: As ``per_token``, for it.
        shape: Block shape for the FLOPs model, from the transformer's config.
        compression: Video frames and pixels per latent frame and latent pixel, when no VAE tells.
        patch: (time, space) patch sizes, from the transformer's config.
        attention_input: Normalised input of the self-attention for all frames (``kv="full"``).
        trims_text: Whether ``drop_text_padding`` is available.
    """

    blocks: str
    probe: str
    geometry: ReadGeometry
    block_arguments: tuple[str, ...]
    per_token: Mapping[str, PerToken]
    attention: str
    attention_arguments: tuple[str, ...]
    attention_per_token: Mapping[str, PerToken]
    shape: Callable[[Mapping[str, Any]], BlockShape]
    compression: tuple[int, int] = (4, 8)
    patch: Callable[[Mapping[str, Any]], tuple[int, int]]
    attention_input: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None
    trims_text: bool = False


_ADAPTERS: dict[str, FISAdapter] = {}


def register_adapter(transformer: type[nn.Module] | str, adapter: FISAdapter) -> None:
    """Teach fis-dit a transformer class (or its name).

    A subclass is not covered by its parent's adapter: causal and autoregressive models share blocks with
    the ordinary ones, and would come out wrong.
    """
    name = transformer if isinstance(transformer, str) else transformer.__name__
    _ADAPTERS[name] = adapter


def adapter_of(transformer: nn.Module | str) -> FISAdapter:
    """The adapter of a transformer.

    Raises:
        UnsupportedModelError: A TypeError that lists the classes with an adapter.
    """
    from fis_dit.adapters import models as _built_in  # noqa: F401

    name = transformer if isinstance(transformer, str) else type(transformer).__name__
    if name not in _ADAPTERS:
        raise UnsupportedModelError(
            f"{name} is not supported; use one of {', '.join(sorted(_ADAPTERS))}, or describe yours "
            "with fis_dit.register_adapter"
        )
    return _ADAPTERS[name]


def supported() -> tuple[str, ...]:
    """Names of all classes with an adapter."""
    from fis_dit.adapters import models as _built_in  # noqa: F401

    return tuple(sorted(_ADAPTERS))
