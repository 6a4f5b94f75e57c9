"""Gather the anchors' tokens before a block, and fill the frames that it skipped afterwards.

Paper: "Frame Interleaved Sparsity" (arXiv 2605.11869). It says that skipped frames are interpolated from
neighbouring computed ones. Interpolating the *residual* and not the state is our reading of it, because
the state of a skipped frame holds noise of its own that its neighbours do not have.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fis_dit.method.neighbours import FrameIndex


def gather_frames(tokens: Tensor, index: FrameIndex, dim: int = 1) -> Tensor:
    """Keep the tokens of the anchors.

    Args:
        tokens: Has F * P entries along ``dim``, frame by frame.
        index: Of the phase.
        dim: Dimension of the tokens.

    Returns:
        The same with K * P entries along ``dim``, on the device of the tokens, wherever the index is.
    """
    split = tokens.unflatten(dim, (index.frames.shape[0], -1))
    return split.index_select(dim, index.anchors.to(tokens.device)).flatten(dim, dim + 1)


def fill_skipped_frames(
    hidden: Float[Tensor, "b s d"],
    computed: Float[Tensor, "b k d"],
    index: FrameIndex,
    lift: str = "residual",
) -> Float[Tensor, "b s d"]:
    """Return a block's output for all frames, from its output at the anchors.

    With d = block(x) - x at the anchors, a skipped frame f between anchors a and b becomes
    h[f] + (1-u) d[a] + u d[b] ("residual", "hold"), stays h[f] ("carry"), or is replaced by
    (1-u) y[a] + u y[b] ("state"). Anchors are copied exactly.

    Args:
        hidden: h, the block's input of all frames, frame by frame.
        computed: y, the block's output at the anchors.
        index: Of the phase.
        lift: "residual", "hold", "carry" or "state".

    Returns:
        The output on the device of ``computed``: a dense block, too, answers where its weights are.
    """
    hidden, index = hidden.to(computed.device), index.to(computed.device)
    frames = hidden.unflatten(1, (index.frames.shape[0], -1))
    at_anchors = computed.unflatten(1, (index.anchors.shape[0], -1))
    if lift == "state":
        filled = _interpolate(at_anchors, index)
    else:
        filled = frames.index_select(1, index.skipped)
        if lift != "carry":
            filled = filled + _interpolate(
                at_anchors - frames.index_select(1, index.anchors), index
            )
    return _restore_order(at_anchors, filled, index)


def fill_skipped_attention(
    computed: Float[Tensor, "b k d"], index: FrameIndex, lift: str = "residual"
) -> Float[Tensor, "b s d"]:
    """Return an attention's output for all frames, from its output o at the anchors.

    The output of an attention is a residual already, so a skipped frame between anchors a and b gets
    (1-u) o[a] + u o[b], or 0 ("carry").

    Args:
        computed: o, the output at the anchors.
        index: Of the phase.
        lift: "residual", "hold" or "carry".
    """
    index = index.to(computed.device)
    at_anchors = computed.unflatten(1, (index.anchors.shape[0], -1))
    filled = _interpolate(at_anchors, index)
    filled = torch.zeros_like(filled) if lift == "carry" else filled
    return _restore_order(at_anchors, filled, index)


def _interpolate(values: Tensor, index: FrameIndex) -> Tensor:
    """Mix the values "b k p d" of each skipped frame's two anchors; "b m p d"."""
    left, right = values.index_select(1, index.left), values.index_select(1, index.right)
    return torch.lerp(left, right, index.weight.to(values.dtype))


def _restore_order(at_anchors: Tensor, filled: Tensor, index: FrameIndex) -> Tensor:
    """Put anchors "b k p d" and skipped frames "b m p d" into their places; "b s d"."""
    return torch.cat([at_anchors, filled], 1).index_select(1, index.order).flatten(1, 2)
