"""Calibrate which blocks to leave dense: the ``plan`` command and function.

A block's score says how much sparsity hurts there. "local" evaluates, in one dense pass, the sparse
block on the dense input of every block; "endpoint" makes one block sparse at a time and measures the
output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import progress, say
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.hooks import BlockHook
from fis_dit.adapters.layout import FISAdapter
from fis_dit.adapters.pipelines import load_pipeline, run_pipeline
from fis_dit.adapters.registry import find_adapter
from fis_dit.config import FISConfig, PlanConfig
from fis_dit.method.anchors import choose_anchors
from fis_dit.method.cost import choose_blocks, flops
from fis_dit.method.metrics import relative_l2
from fis_dit.method.neighbours import find_neighbours, make_frame_index

Run = Any  # a callable without arguments that runs the transformer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A calibrated setting with the scores it came from; prints as a table."""

    config: FISConfig
    scores: tuple[float, ...]
    speedup: float

    def to_json(self) -> dict[str, Any]:
        """Blocks, scores and predicted speed-up."""
        blocks = list(self.config.blocks or ())
        return {"sparse_blocks": blocks, "scores": list(self.scores), "speedup": self.speedup}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(
            "block", "error if sparse", "runs", title=f"plan: {self.speedup:.2f}x by FLOPs"
        )
        for number, score in enumerate(self.scores):
            runs = "sparse" if number in (self.config.blocks or ()) else "dense"
            table.add_row(str(number), f"{score:.4f}", runs)
        return table


@torch.no_grad()
def block_scores(
    transformer: Any, run: Run, config: FISConfig, method: Literal["local", "endpoint"] = "local"
) -> tuple[list[float], tuple[int, int]]:
    """Score every block of a transformer.

    Args:
        transformer: Dense, without FIS.
        run: Runs it once or more (a pipeline call, a few forwards) and returns its output.
        config: Stride, lift and boundaries to score; the block site with anchor keys is scored.
        method: As in the module's description.

    Returns:
        One score per block, higher is worse: relative L2 error of the block's residual, or of the
        output. And (F, P) of the last forward.
    """
    with apply_fis(transformer, replace(config, blocks=None, dense_head=0, dense_tail=0)) as handle:
        run()
        told = handle.summary()["transformer"]
    frames, tokens = told["frames"], told["tokens_per_frame"]
    depth = len(getattr(transformer, find_adapter(transformer).blocks))
    if method == "endpoint":
        dense, scores = run(), []
        with progress("calibrating blocks", depth) as bar:
            for number in range(depth):
                with apply_fis(transformer, replace(config, blocks=(number,))):
                    scores.append(relative_l2(run(), dense))
                bar.advance()
        return scores, (frames, tokens)
    return _local_scores(transformer, run, config, frames), (frames, tokens)


def _local_scores(transformer: Any, run: Run, config: FISConfig, frames: int) -> list[float]:
    adapter = find_adapter(transformer)
    blocks: nn.ModuleList = getattr(transformer, adapter.blocks)
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)
    busy = False

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            nonlocal busy
            if busy:  # the sparse evaluation below calls the block again
                return
            busy = True
            named = {**dict(zip(adapter.block_arguments, args, strict=False)), **kwargs}
            for residue in range(min(config.stride, frames)):
                sums[number] += _local_error(adapter, module, named, out, config, frames, residue)
                counts[number] += 1
            busy = False

        return hook

    handles = [b.register_forward_hook(watch(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _local_error(
    adapter: FISAdapter,
    block: nn.Module,
    named: dict[str, Any],
    out: Any,
    config: FISConfig,
    frames: int,
    residue: int,
) -> float:
    """||FIS_l(h) - block_l(h)|| / ||block_l(h) - h|| of one block, input and residue."""
    chosen = choose_anchors(frames, config.stride, residue, boundaries=config.boundaries)
    if len(chosen) == frames:
        return 0.0
    first = named[adapter.block_arguments[0]]
    plan = find_neighbours(frames, chosen, lift=config.lift, excluded=config.condition_frames)
    hook = BlockHook(0, adapter.block_arguments, adapter.per_token, config)
    hook.plan, hook.tokens = make_frame_index(plan, first.device), first.shape[1]
    sparse = hook.evaluate(block, block, named)
    wanted, got = (value[0] if isinstance(value, tuple) else value for value in (out, sparse))
    return float((got - wanted).norm() / (wanted - first.to(wanted.device)).norm())


def plan(
    pipe: Any,
    prompts: Sequence[str],
    target_speedup: float = 2.0,
    *,
    num_inference_steps: int = 4,
    config: FISConfig | None = None,
    method: Literal["local", "endpoint"] = "local",
    clip: tuple[int, int, int] = (81, 720, 1280),
    guidance_scale: float = 1.0,
    seed: int = 0,
) -> FISConfig:
    """Choose the sparse blocks of a pipeline's ``transformer`` for a target speed-up.

    Args:
        pipe: A diffusers pipeline, or anything that ``run_pipeline`` can run.
        prompts: Calibration prompts.
        target_speedup: Of the blocks, by the FLOPs model.
        num_inference_steps: Denoising steps of a run.
        config: Setting whose blocks are chosen; default ``paper-like``.
        method: "local" or "endpoint".
        clip: (frames, height, width) in pixels.
        guidance_scale: 1 turns guidance off.
        seed: Of the noise.

    Raises:
        ConfigError: If the target is out of reach at this stride.
    """
    return _plan(
        pipe,
        prompts,
        target_speedup,
        num_inference_steps,
        config,
        method,
        clip,
        guidance_scale,
        seed,
    ).config


def _plan(
    pipe: Any,
    prompts: Sequence[str],
    target: float,
    steps: int,
    config: FISConfig | None,
    method: Literal["local", "endpoint"],
    clip: tuple[int, int, int],
    guidance: float,
    seed: int,
) -> Plan:
    base, model = config or FISConfig(), pipe.transformer

    def run() -> Tensor:
        videos = [
            run_pipeline(
                pipe,
                prompt,
                clip=clip,
                steps=steps,
                guidance=guidance,
                seed=seed + number,
                output_type="latent",
            )
            for number, prompt in enumerate(prompts)
        ]
        # Compared in float64, which not every device has.
        return torch.stack([torch.as_tensor(video).cpu() for video in videos])

    scores, (frames, tokens) = block_scores(model, run, base, method)
    shape = find_adapter(model).shape(model.config)
    blocks = choose_blocks(target, shape, base, scores, frames, tokens)
    chosen = replace(
        base,
        blocks=blocks,
        model_class=type(model).__name__,
        layers=len(scores),
        frames=frames,
    )
    speedup = flops(shape, chosen, len(scores), frames, tokens).speedup
    return Plan(config=chosen, scores=tuple(scores), speedup=speedup)


def write_plan(config: PlanConfig) -> Plan:
    """The ``plan`` command: calibrate on a pipeline directory and write the JSON file.

    Raises:
        InputError: If the model, the prompts or the target cannot be used.
    """
    device = resolve_device(config.device)
    prompts = [line for path in config.prompts for line in _lines(path)]
    if not prompts:
        raise InputError(f"{', '.join(config.prompts)} holds no prompt; write one a line")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = load_pipeline(config.model, dtype, device)
    say(f"calibrating on {len(prompts)} prompts, {config.num_inference_steps} steps each")
    found = _plan(
        pipe,
        prompts,
        config.target_speedup,
        config.num_inference_steps,
        FISConfig.from_preset(config.preset),
        config.method,
        (config.num_frames, config.height, config.width),
        config.guidance_scale,
        config.seed,
    )
    atomic_write(Path(config.out), found.config.to_json())
    say(f"plan: {config.out}")
    return found


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a text file") from None
    return [line.strip() for line in lines if line.strip()]
