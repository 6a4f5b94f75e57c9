"""The ``generate`` command: a clip from a local pipeline, frame-sparse, and dense to compare."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effml_common.device import resolve_device
from effml_common.errors import NonFiniteError
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import say
from effml_common.parsing import dump_config
from effml_common.report import Report, ReportBuilder, Row
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.clip_files import write_clip
from fis_dit.adapters.pipelines import ClipRequest, TimedClip, load_pipeline, make_timed_clip
from fis_dit.config import FISConfig, GenerateConfig, read_setting
from fis_dit.method.metrics import coverage, motion_error, psnr, relative_l2


def generate(config: GenerateConfig) -> Report:
    """Make ``fis.gif`` (or mp4) and, with ``compare_dense``, ``dense.gif`` and their distance.

    Args:
        config: Pipeline, clip, setting and output.

    Returns:
        The report: a row for the sparse clip and, to compare, one for the dense clip.

    Raises:
        InputError: If the model, the plan, the image or the LoRA cannot be used.
        NonFiniteError: If the clip holds NaN or infinity.
    """
    # Read.
    builder = ReportBuilder("fis-dit", ("diffusers", "transformers"))
    device = resolve_device(config.device)
    setting = read_setting(config.plan, config.preset, config.num_inference_steps)
    made_with = {"config.yaml": dump_config(config), "plan.json": setting.to_json()}
    pipe = load_pipeline(config.model, getattr(torch, config.dtype), device, config.lora)

    # Run.
    clips = _make_clips(pipe, config, setting, device)

    # Write.
    out = run_folder(config.out, "generate")
    files = _write_clips(out, config, clips, made_with)
    report = builder.write(
        out / "run",
        _make_rows(setting, clips),
        device=device,
        seeds=[config.seed],
        notes=[_describe(*item) for item in clips["fis"].summary.items()],
        files=files,
    )
    say(f"clips: {out}")
    return report


def _make_clips(
    pipe: Any, config: GenerateConfig, setting: FISConfig, device: torch.device
) -> dict[str, TimedClip]:
    """Make the clip with frame sparsity and, to compare, without.

    Raises:
        NonFiniteError: If the sparse clip holds NaN or infinity.
    """
    request = ClipRequest(
        prompt=config.prompt,
        clip=(config.num_frames, config.height, config.width),
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        seed=config.seed,
        image=config.image,
    )

    # The sparse clip comes first, because the other one is of no use without it.
    with apply_fis(pipe, setting) as handle:
        say("sparse run")
        clip = make_timed_clip(pipe, request, device, warm_up=config.compare_dense)
        clips = {"fis": replace(clip, summary=handle.summary())}
    if not np.isfinite(clip.frames).all():
        raise NonFiniteError("the clip is not finite; use --dtype float32 or bfloat16")

    if config.compare_dense:
        say("dense run")
        clips["dense"] = make_timed_clip(pipe, request, device, warm_up=True)
    return clips


def _write_clips(
    out: Path, config: GenerateConfig, clips: Mapping[str, TimedClip], made_with: Mapping[str, str]
) -> list[str]:
    """Write the clips, and what they were made with; return the clips' file names."""
    (out / "run").mkdir(parents=True, exist_ok=True)
    files = {name: f"{name}.{config.format}" for name in clips}
    for name, clip in clips.items():
        write_clip(clip.frames, out / files[name], config.fps)
    for name, text in made_with.items():
        atomic_write(out / "run" / name, text)
    return list(files.values())


def _make_rows(setting: FISConfig, clips: Mapping[str, TimedClip]) -> list[Row]:
    """Make a row for each clip; that of the sparse one has its distance to the dense one."""
    sparse, dense = clips["fis"], clips.get("dense")
    seconds = {
        name: {"seconds": [clip.seconds], "transformer seconds": [clip.transformer_seconds]}
        for name, clip in clips.items()
    }
    text = f"stride {setting.stride}, sites {setting.sites}, keys {setting.kv}"
    if dense is None:
        return [Row("FIS", text, seconds["fis"])]

    # Metrics take "b c f h w".
    clip, reference = (
        torch.from_numpy(timed.frames).permute(3, 0, 1, 2)[None] for timed in (sparse, dense)
    )
    distances = {
        "PSNR to dense, dB": [psnr(clip, reference, 1.0)],
        "relative L2": [relative_l2(clip, reference)],
        "motion error": [motion_error(clip, reference)],
        "worst / best frame": [coverage(clip, reference)],
        "speed-up": [dense.transformer_seconds / sparse.transformer_seconds],
    }
    return [
        Row("FIS", text, {**seconds["fis"], **distances}),
        Row("dense", "", seconds["dense"]),
    ]


def _describe(name: str, summary: Mapping[str, Any]) -> str:
    """Say in a line what a transformer ran."""
    dense = summary.get("dense", True)
    run = "dense" if dense else f"{len(summary['sparse_blocks'])} sparse blocks"
    return f"{name}: {run} of {summary['depth']}, {summary.get('frames', 'no')} latent frames"
