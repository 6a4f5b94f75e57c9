"""FLOPs of dense and frame-sparse video transformers (a multiply-add counts 2).

Symbols: D width, f inner width of the feed-forward, T text tokens, S = F * P video tokens, s = K * P of
them at the anchors, kv those that give keys and values (s, or S with ``kv="full"``). Gathering and
filling frames is memory traffic, and not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from effml_common.errors import ConfigError
from fis_dit.config import FISConfig
from fis_dit.method.anchors import choose_anchors


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the cost of a transformer block depends on.

    Attributes:
        kind: "cross" attends to text in a second attention (Wan, LTX); "joint" attends to video and
            text together (HunyuanVideo 1.5, CogVideoX, Mochi).
        width: D.
        ffn: f.
        text: T.
        ffn_matrices: 2, or 3 for gated feed-forwards.
        text_width: Width of the text stream of a joint block; None: D.
        text_ffn: Its inner width; None: f.
    """

    kind: Literal["cross", "joint"]
    width: int
    ffn: int
    text: int
    ffn_matrices: int = 2
    text_width: int | None = None
    text_ffn: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of one run of the blocks over all steps, for one sample.

    Attributes:
        dense: Without sparsity.
        sparse: With it.
        counts: Anchors per phase.
        per_block: Speed-up of one sparse block, averaged over phases.
    """

    dense: float
    sparse: float
    counts: tuple[int, ...]
    per_block: float

    @property
    def speedup(self) -> float:
        """Dense over sparse."""
        return self.dense / self.sparse


def flops(
    shape: BlockShape, config: FISConfig, depth: int, frames: int, tokens: int, steps: int = 1
) -> Cost:
    """Count the FLOPs of ``depth`` blocks over ``steps`` denoising steps.

    Args:
        shape: Of every block.
        config: Of the sparsity.
        depth: L, number of blocks.
        frames: F, latent frames.
        tokens: P, tokens per frame.
        steps: Evaluations; those of ``config.dense_steps`` are dense.

    >>> from fis_dit.method.cost import BlockShape
    >>> wan_a14b = BlockShape(kind="cross", width=5120, ffn=13824, text=512)
    >>> cost = flops(wan_a14b, FISConfig(stride=2), depth=40, frames=21, tokens=3600)
    >>> round(cost.speedup, 2)
    2.15
    """
    # One dense block, and one sparse block on the average over phases.
    total = frames * tokens
    dense_block = block_flops(shape, total, total, total)
    counts = count_anchors(config, frames)
    by_phase = [sparse_block_flops(shape, config, frames, tokens, k) for k in counts]
    sparse_block = sum(by_phase) / len(counts)

    # One step, and all of them.
    number = len(config.sparse_blocks(depth))
    sparse_step = (depth - number) * dense_block + number * sparse_block
    dense_steps = {s % steps for s in config.dense_steps if -steps <= s < steps}
    sparse = len(dense_steps) * depth * dense_block + (steps - len(dense_steps)) * sparse_step
    return Cost(
        dense=steps * depth * dense_block,
        sparse=sparse,
        counts=counts,
        per_block=dense_block / sparse_block,
    )


def block_flops(shape: BlockShape, s: int, kv: int, rest: int) -> int:
    """Count the FLOPs of one block and one sample.

    Args:
        shape: Of the block.
        s: Video tokens that query in self-attention.
        kv: Video tokens that give keys and values.
        rest: Video tokens that go through cross-attention and feed-forward.
    """
    d, t = shape.width, shape.text
    feed_forward = 2 * shape.ffn_matrices * d * shape.ffn * rest
    if shape.kind == "cross":
        attention = 4 * d * d * (s + kv) + 4 * s * kv * d
        return attention + 4 * d * d * (rest + t) + 4 * rest * t * d + feed_forward
    e = d if shape.text_width is None else shape.text_width
    g = shape.ffn if shape.text_ffn is None else shape.text_ffn
    attention = 4 * d * d * (s + kv) + 8 * d * e * t + 4 * (s + t) * (kv + t) * d
    return attention + feed_forward + 2 * shape.ffn_matrices * e * g * t


def sparse_block_flops(
    shape: BlockShape, config: FISConfig, frames: int, tokens: int, k: int
) -> int:
    """Count the FLOPs of one sparse block with ``k`` anchors.

    Args:
        shape: Of the block.
        config: Of the sparsity.
        frames: F, latent frames.
        tokens: P, tokens per frame.
        k: K, the number of anchors.
    """
    total, s = frames * tokens, k * tokens
    kv = total if config.kv == "full" else s
    return block_flops(shape, s, kv, s if config.sites == "block" else total)


def count_anchors(config: FISConfig, frames: int) -> tuple[int, ...]:
    """Count the anchors K of every phase (of phase 0 alone for the static pattern)."""
    phases = 1 if config.pattern == "static" else min(config.stride, frames)
    rules = {"boundaries": config.boundaries, "equalize": config.equalize}
    return tuple(len(choose_anchors(frames, config.stride, r, **rules)) for r in range(phases))


def choose_blocks(
    target: float,
    shape: BlockShape,
    config: FISConfig,
    scores: Sequence[float],
    frames: int,
    tokens: int,
) -> tuple[int, ...]:
    """Choose the fewest blocks, of lowest score first, that reach a target speed-up.

    Args:
        target: Speed-up of the blocks, 1 or more.
        shape: Of every block.
        config: Of the sparsity; its blocks do not count.
        scores: One for each block; higher is worse.
        frames: F, latent frames.
        tokens: P, tokens per frame.

    Returns:
        Indices of the sparse blocks, ascending.

    Raises:
        ConfigError: If even all blocks do not reach it.
    """
    depth = len(scores)

    def speedup(blocks: Sequence[int]) -> float:
        trial = replace(config, blocks=tuple(blocks))
        return flops(shape, trial, depth, frames, tokens).speedup

    ranked = sorted(range(depth), key=lambda block: (scores[block], block))
    for count in range(depth + 1):
        if speedup(ranked[:count]) >= target:
            return tuple(sorted(ranked[:count]))
    raise ConfigError(
        f"all blocks sparse give {speedup(ranked):.2f}x, not {target:.2f}x; raise the stride"
    )
