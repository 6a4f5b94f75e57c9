"""The ``plan`` command and function: calibrate which blocks stay dense for a target speed-up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import say
from fis_dit.adapters.block_scores import score_blocks
from fis_dit.adapters.pipelines import ClipRequest, load_pipeline, run_pipeline
from fis_dit.config import FISConfig, PlanConfig
from fis_dit.method.cost import choose_blocks, flops


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A calibrated setting with the scores it came from; prints as a table.

    Attributes:
        config: The setting, with the blocks that were chosen.
        scores: Of every block; higher is worse.
        speedup: Of the blocks, by the FLOPs model.
    """

    config: FISConfig
    scores: tuple[float, ...]
    speedup: float

    def to_json(self) -> dict[str, Any]:
        """Return blocks, scores and predicted speed-up."""
        blocks = list(self.config.blocks or ())
        return {"sparse_blocks": blocks, "scores": list(self.scores), "speedup": self.speedup}

    def __rich__(self) -> Any:
        from rich.table import Table

        title = f"plan: {self.speedup:.2f}x by FLOPs"
        table = Table("block", "error if sparse", "runs", title=title)
        for number, score in enumerate(self.scores):
            runs = "sparse" if number in (self.config.blocks or ()) else "dense"
            table.add_row(str(number), f"{score:.4f}", runs)
        return table


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
        pipe: A diffusers pipeline, or anything that is called like one.
        prompts: Calibration prompts.
        target_speedup: Of the blocks, by the FLOPs model.
        num_inference_steps: Denoising steps of a run.
        config: Setting whose blocks are chosen; default ``paper-like``.
        method: "local" or "endpoint".
        clip: (frames, height, width) in pixels.
        guidance_scale: 1 turns guidance off.
        seed: Of the noise.

    Returns:
        The setting with its blocks, and the model and clip length that it was calibrated for.

    Raises:
        ConfigError: If the target is out of reach at this stride.
    """
    requests = [
        ClipRequest(
            prompt=prompt,
            clip=clip,
            steps=num_inference_steps,
            guidance=guidance_scale,
            seed=seed + number,
        )
        for number, prompt in enumerate(prompts)
    ]
    return _calibrate(pipe, requests, config or FISConfig(), method, target_speedup).config


def write_plan(config: PlanConfig) -> Plan:
    """Calibrate on a pipeline directory and write the JSON file (the ``plan`` command).

    Args:
        config: Model, prompts, target and method.

    Returns:
        The plan; prints as a table.

    Raises:
        InputError: If the model, the prompts or the target cannot be used.
    """
    # Read: prompts first, because they cost nothing.
    device = resolve_device(config.device)
    requests = [
        ClipRequest(
            prompt=prompt,
            clip=(config.num_frames, config.height, config.width),
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            seed=config.seed + number,
        )
        for number, prompt in enumerate(_read_prompts(config.prompts))
    ]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = load_pipeline(config.model, dtype, device)

    # Run.
    say(f"calibrating on {len(requests)} prompts, {config.num_inference_steps} steps each")
    base = FISConfig.from_preset(config.preset)
    calibrated = _calibrate(pipe, requests, base, config.method, config.target_speedup)

    # Write.
    atomic_write(Path(config.out), calibrated.config.to_json())
    say(f"plan: {config.out}")
    return calibrated


def _calibrate(
    pipe: Any,
    requests: Sequence[ClipRequest],
    base: FISConfig,
    method: Literal["local", "endpoint"],
    target_speedup: float,
) -> Plan:
    """Score the blocks, and make those of lowest score sparse until the target is reached."""

    def make_latents() -> Tensor:
        latents = [run_pipeline(pipe, request, output_type="latent") for request in requests]
        # Compared in float64, which not every device has.
        return torch.stack([torch.as_tensor(latent).cpu() for latent in latents])

    # How much sparsity hurts in every block.
    model = pipe.transformer
    scored = score_blocks(model, make_latents, base, method)

    # The fewest blocks that reach the target.
    shape, depth, size = scored.shape, len(scored.scores), (scored.frames, scored.tokens)
    config = replace(
        base,
        blocks=choose_blocks(target_speedup, shape, base, scored.scores, *size),
        model_class=type(model).__name__,
        layers=depth,
        frames=scored.frames,
    )
    speedup = flops(shape, config, depth, *size).speedup
    return Plan(config=config, scores=scored.scores, speedup=speedup)


def _read_prompts(paths: Sequence[str]) -> tuple[str, ...]:
    """Read text files with one prompt a line; blank lines do not count."""
    prompts = list[str]()
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); give a text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{', '.join(paths)} holds no prompt; write one a line")
    return tuple(prompts)
