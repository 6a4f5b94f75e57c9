"""What fis-dit must know of a transformer class: names and layout of its modules and arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fis_dit.adapters.geometry import ReadGeometry
from fis_dit.method.cost import BlockShape


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """An argument with one entry per video token, gathered with the frames.

    Attributes:
        dim: Dimension of the tokens; tensors in a tuple share it.
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
        attention_per_token: Same as ``per_token``, for the self-attention.
        shape: Block shape for the FLOPs model, from the transformer's config.
        compression: Video frames per latent frame, and pixels per latent pixel, where no VAE says so.
        patch: (time, space) patch sizes, from the transformer's config.
        attention_input: Computes the normalised input of the self-attention for all frames
            (``kv="full"``); None if full keys are not available.
        trims_text: Whether ``drop_text_padding`` is available.

    A class that differs in little from one that is known starts from that one's adapter:

    >>> from dataclasses import replace
    >>> from fis_dit.adapters.families.wan import WAN
    >>> replace(WAN, compression=(8, 16)).probe
    'patch_embedding'
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


# Positional arguments that the self-attentions of the families have in common.
JOINT_ATTENTION_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "attention_mask",
    "image_rotary_emb",
)
