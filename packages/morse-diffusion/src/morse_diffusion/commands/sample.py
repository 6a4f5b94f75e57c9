"""The ``sample`` command: images within a time budget."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.logging import jsonable
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.adapters.pixels import call_inputs, pictures, result_images
from morse_diffusion.adapters.run_summary import RunSummary
from morse_diffusion.config import SampleConfig


@dataclass(frozen=True)
class SampleResult:
    """Names of the image files, and what the run did."""

    files: list[str]
    summary: dict[str, Any]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return files and summary."""
        return {"files": self.files, "summary": self.summary}

    def __rich__(self) -> str:
        return f"{self.text}\n{len(self.files)} images"


def sample(config: SampleConfig) -> SampleResult:
    """Sample and write PNG files and ``run/summary.json``.

    Raises:
        InputError: If the pipeline, the Dot or the budget cannot be used.
    """
    # Read the pipeline and its Dot.
    out = run_folder(config.out, "sample")
    pipe = load_pipeline(config.pipe, resolve_device(config.device))
    dot = MorseDot.from_pretrained(config.dot, denoiser_of(pipe))
    fast = MorsePipeline.from_pipe(pipe, dot, speed_ratio=config.speed_ratio, early=config.early)

    # Sample.
    inputs = call_inputs(pipe, config.prompt, config.n, config.guidance_scale)
    generator = torch.Generator().manual_seed(config.seed)
    images = result_images(fast(budget_lsd=config.budget_lsd, generator=generator, **inputs))
    return write_samples(out, images, fast.summary())


def write_samples(out: Path, images: torch.Tensor, summary: RunSummary) -> SampleResult:
    """Write images [n, c, h, w] in [-1, 1] as PNG files, and the summary of their run."""
    (out / "run").mkdir(parents=True, exist_ok=True)
    files = [f"{i:04d}.png" for i in range(len(images))]
    for name, picture in zip(files, pictures(images), strict=True):
        picture.save(out / name)
    atomic_write(out / "run" / "summary.json", json.dumps(jsonable(summary.to_json())) + "\n")
    return SampleResult(files, summary.to_json(), str(summary))
