"""The ``sample`` command: images within a time budget."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effml_common.device import resolve_device
from effml_common.files import atomic_write
from effml_common.logging import jsonable
from morse_diffusion.adapters.calls import denoiser_of
from morse_diffusion.adapters.dot import MorseDot
from morse_diffusion.adapters.loading import load_pipeline
from morse_diffusion.adapters.pipeline import MorsePipeline
from morse_diffusion.adapters.pixels import as_images, call_inputs, pictures
from morse_diffusion.config import SampleConfig


@dataclass(frozen=True)
class Sampled:
    """What was written, and what the run did."""

    files: list[str]
    summary: dict[str, Any]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Files and summary."""
        return {"files": self.files, "summary": self.summary}

    def __rich__(self) -> str:
        return f"{self.text}\n{len(self.files)} images"


def sample(config: SampleConfig) -> Sampled:
    """Sample and write PNG files and ``run/summary.json``.

    Raises:
        InputError: If the pipeline, the Dot or the budget cannot be used.
    """
    pipe = load_pipeline(config.pipe, resolve_device(config.device))
    dot = MorseDot.from_pretrained(config.dot, denoiser_of(pipe))
    fast = MorsePipeline.from_pipe(pipe, dot, speed_ratio=config.speed_ratio, early=config.early)
    inputs = call_inputs(pipe, config.prompt, config.n, config.guidance_scale)
    generator = torch.Generator().manual_seed(config.seed)
    result = fast(budget_lsd=config.budget_lsd, generator=generator, **inputs)
    out = Path(config.out or time.strftime("runs/sample-%Y%m%d-%H%M%S"))
    (out / "run").mkdir(parents=True, exist_ok=True)
    files = [f"{i:04d}.png" for i in range(config.n)]
    for name, picture in zip(files, pictures(as_images(result)), strict=True):
        picture.save(out / name)
    summary = fast.summary()
    atomic_write(out / "run" / "summary.json", json.dumps(jsonable(summary.to_json())) + "\n")
    return Sampled(files, summary.to_json(), str(summary))
