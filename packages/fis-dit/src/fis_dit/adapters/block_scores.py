"""Score every block of a transformer: how much sparsity hurts there.

"local" evaluates, in one dense pass, the sparse block on the dense input of every block; "endpoint"
makes one block sparse at a time and measures the output.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effml_common.logging import Progress
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.attach import blocks_of
from fis_dit.adapters.hooks import BlockHook
from fis_dit.adapters.layout import FISAdapter
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig
from fis_dit.method.anchors import choose_anchors
from fis_dit.method.cost import BlockShape
from fis_dit.method.metrics import relative_l2
from fis_dit.method.neighbours import Neighbours, find_neighbours, make_frame_index

Run = Callable[[], Tensor]  # runs the transformer once or more, and returns its output


@dataclass(frozen=True, kw_only=True)
class BlockScores:
    """What sparsity costs in quality, block by block.

    Attributes:
        scores: One for each block, higher is worse: relative L2 error of the block's residual ("local")
            or of the output ("endpoint").
        frames: F, latent frames of the last forward.
        tokens: P, tokens per frame of the last forward.
        shape: Of every block, for the FLOPs model.
    """

    scores: tuple[float, ...]
    frames: int
    tokens: int
    shape: BlockShape


@torch.no_grad()
def score_blocks(
    transformer: Any, run: Run, config: FISConfig, method: Literal["local", "endpoint"] = "local"
) -> BlockScores:
    """Score every block of a transformer.

    Args:
        transformer: Dense, without FIS.
        run: Runs it once or more (a pipeline call, a few forwards) and returns its output.
        config: Stride, lift and boundaries to score; the block site with anchor keys is scored.
        method: As in the module's description.
    """
    # One sparse run tells the size of the clip.
    with apply_fis(transformer, replace(config, blocks=None, dense_head=0, dense_tail=0)) as handle:
        run()
        summary = handle.summary()["transformer"]

    adapter = find_adapter(transformer)
    if method == "endpoint":
        scores = _score_by_output(transformer, run, config, summary["depth"])
    else:
        blocks = blocks_of(transformer, adapter)
        scores = _score_by_own_error(adapter, blocks, run, config, summary["frames"])
    return BlockScores(
        scores=tuple(scores),
        frames=summary["frames"],
        tokens=summary["tokens_per_frame"],
        shape=adapter.shape(transformer.config),
    )


def _score_by_output(transformer: Any, run: Run, config: FISConfig, depth: int) -> list[float]:
    """Measure the error of the output with one block sparse at a time."""
    dense, scores = run(), []
    with Progress("calibrating blocks", depth) as bar:
        for number in range(depth):
            with apply_fis(transformer, replace(config, blocks=(number,))):
                scores.append(relative_l2(run(), dense))
            bar.advance()
    return scores


def _score_by_own_error(
    adapter: FISAdapter, blocks: nn.ModuleList, run: Run, config: FISConfig, frames: int
) -> list[float]:
    """Average every block's own error over phases and forwards of one dense run."""
    phases = _find_phases(config, frames)
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)
    scoring = False

    def score_block(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal scoring
            if scoring:  # the sparse evaluation below calls the block again
                return
            scoring = True
            named = {**dict(zip(adapter.block_arguments, args, strict=False)), **kwargs}
            for neighbours in phases:
                sums[number] += _measure_own_error(
                    adapter, module, named, output, config, neighbours
                )
                counts[number] += 1
            scoring = False

        return hook

    # The hooks see every block's dense input and output.
    hooks = [
        block.register_forward_hook(score_block(number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _find_phases(config: FISConfig, frames: int) -> list[Neighbours]:
    """Find the interpolation sources of every residue of the stride."""
    anchor_sets = [
        choose_anchors(frames, config.stride, residue, boundaries=config.boundaries)
        for residue in range(min(config.stride, frames))
    ]
    return [
        find_neighbours(frames, anchors, lift=config.lift, excluded=config.condition_frames)
        for anchors in anchor_sets
    ]


def _measure_own_error(
    adapter: FISAdapter,
    block: nn.Module,
    named: dict[str, Any],
    output: Any,
    config: FISConfig,
    neighbours: Neighbours,
) -> float:
    """Compute ||FIS_l(h) - block_l(h)|| / ||block_l(h) - h|| of one block, input and phase."""
    if not neighbours.skipped:
        return 0.0

    # The block on the anchors of its dense input, and the other frames filled.
    hidden = named[adapter.block_arguments[0]]
    hook = BlockHook(0, adapter.block_arguments, adapter.per_token, config)
    hook.frame_index = make_frame_index(neighbours, hidden.device)
    hook.tokens = hidden.shape[1]
    sparse_output = hook.run_sparse(block, block, named)

    dense, sparse = (
        value[0] if isinstance(value, tuple) else value for value in (output, sparse_output)
    )
    return float((sparse - dense).norm() / (dense - hidden.to(dense.device)).norm())
