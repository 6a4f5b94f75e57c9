"""The ``generate`` command: a clip from a local pipeline, frame-sparse, and dense to compare."""

import contextlib
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effml_common.cli import dump_config
from effml_common.device import device_name, resolve_device, synchronize
from effml_common.errors import InputError, NonFiniteError
from effml_common.files import atomic_write
from effml_common.logging import say
from effml_common.report import Report, Row, environment, write_report
from fis_dit.adapters.apply import COMPONENTS, apply_fis
from fis_dit.adapters.pipelines import load_pipeline, read_plan, run_pipeline, write_clip
from fis_dit.config import FISConfig, GenerateConfig
from fis_dit.method.metrics import coverage, motion_error, psnr, relative_l2


def generate(config: GenerateConfig) -> Report:
    """Make ``fis.gif`` (or mp4) and, with ``compare_dense``, ``dense.gif`` and their distance.

    Raises:
        InputError: If the model, the plan, the image or the LoRA cannot be used.
        NonFiniteError: If the clip holds NaN or infinity.
    """
    device, started = resolve_device(config.device), time.monotonic()
    chosen = read_plan(config.plan) or FISConfig.from_preset(config.preset)
    if chosen.num_inference_steps is None:
        chosen = FISConfig(**{**vars(chosen), "num_inference_steps": config.num_inference_steps})
    pipe = load_pipeline(config.model, getattr(torch, config.dtype), device)
    if config.lora is not None:
        _load_lora(pipe, config.lora)
    out = Path(config.out or time.strftime("runs/generate-%Y%m%d-%H%M%S"))
    with apply_fis(pipe, chosen) as handle:
        say("sparse run")
        clip, seconds = _timed_clip(pipe, config, device)
        summary = handle.summary()
    if not np.isfinite(clip).all():
        raise NonFiniteError("the clip is not finite; use --dtype float32 or bfloat16")
    clips = {"fis": clip}
    rows = [Row("FIS", _setting(chosen), seconds)]
    if config.compare_dense:
        say("dense run")
        clips["dense"], dense_seconds = _timed_clip(pipe, config, device)
        rows.append(Row("dense", "", dense_seconds))
        distances = _distances(clip, clips["dense"])
        dense_of_transformer = dense_seconds["transformer seconds"][0]
        distances["speed-up"] = [dense_of_transformer / seconds["transformer seconds"][0]]
        rows[0] = Row("FIS", rows[0].setting, {**seconds, **distances})
    (out / "run").mkdir(parents=True, exist_ok=True)
    for name, frames in clips.items():
        write_clip(frames, out / f"{name}.{config.format}", config.fps)
    atomic_write(out / "run" / "config.yaml", dump_config(config))
    atomic_write(out / "run" / "plan.json", chosen.to_json())
    report = Report(
        package="fis-dit",
        version=version("fis-dit"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - started,
        rows=rows,
        notes=[_told(name, told) for name, told in summary.items()],
        files=[f"{name}.{config.format}" for name in clips],
        environment=environment(("diffusers", "transformers"), device_name(device)),
    )
    write_report(report, out / "run")
    say(f"clips: {out}")
    return report


def _load_lora(pipe: Any, path: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; give the safetensors file of a LoRA")
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    try:
        pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not fit the model ({error}); check the file") from error


def _timed_clip(
    pipe: Any, config: GenerateConfig, device: torch.device
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """A clip, and seconds of the whole run and of its transformers.

    Where two runs are compared, one step is made before, so that neither pays for what a device loads
    and allocates once.
    """
    if config.compare_dense:
        _make_clip(pipe, config, steps=1, output_type="latent")
    start = time.monotonic()
    with _transformer_seconds(pipe, device) as inside:
        clip = _make_clip(pipe, config, steps=config.num_inference_steps, output_type="np")
    seconds = {"seconds": [time.monotonic() - start], "transformer seconds": [sum(inside)]}
    return np.asarray(clip, dtype=np.float32), seconds


def _make_clip(pipe: Any, config: GenerateConfig, *, steps: int, output_type: str) -> Any:
    return run_pipeline(
        pipe,
        config.prompt,
        clip=(config.num_frames, config.height, config.width),
        steps=steps,
        guidance=config.guidance_scale,
        seed=config.seed,
        image=config.image,
        output_type=output_type,
    )


@contextlib.contextmanager
def _transformer_seconds(pipe: Any, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every forward of the pipeline's transformers while the context lasts."""
    starts, seconds = list[float](), list[float]()

    def begin(*_: Any) -> None:
        synchronize(device)
        starts.append(time.perf_counter())

    def end(*_: Any) -> None:
        synchronize(device)
        seconds.append(time.perf_counter() - starts.pop())

    models = [getattr(pipe, name, None) for name in COMPONENTS]
    with contextlib.ExitStack() as hooks:
        for model in models:
            if model is not None:
                hooks.callback(model.register_forward_pre_hook(begin).remove)
                hooks.callback(model.register_forward_hook(end).remove)
        yield seconds


def _distances(clip: np.ndarray, dense: np.ndarray) -> dict[str, list[float]]:
    ours, theirs = (torch.from_numpy(v).permute(3, 0, 1, 2)[None] for v in (clip, dense))
    return {
        "PSNR to dense, dB": [psnr(ours, theirs, 1.0)],
        "relative L2": [relative_l2(ours, theirs)],
        "motion error": [motion_error(ours, theirs)],
        "worst / best frame": [coverage(ours, theirs)],
    }


def _setting(config: FISConfig) -> str:
    return f"stride {config.stride}, sites {config.sites}, keys {config.kv}"


def _told(name: str, told: dict[str, Any]) -> str:
    run = "dense" if told.get("dense", True) else f"{len(told['sparse_blocks'])} sparse blocks"
    return f"{name}: {run} of {told['depth']}, {told.get('frames', 'no')} latent frames"
