"""One thread, the helpers beside this file, and as fixtures tiny pipelines, images, a trained Dot."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))

from morse_commands import TRAIN, run_command
from morse_tiny import ddim, tiny_pixels, tiny_sd, tiny_sdxl, tiny_unet


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pixel_pipe():
    return tiny_pixels()


@pytest.fixture
def sd_pipe():
    return tiny_sd()


@pytest.fixture
def sdxl_pipe():
    return tiny_sdxl()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(48):
        values = (torch.rand((20, 24, 3), generator=generator) * 255).to(torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": "abc"[i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def pixels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pixels") / "pipe"
    DDPMPipeline(unet=tiny_unet(), scheduler=ddim()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "pipe"
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(pixels, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "dot"
    words = ["train-dot", pixels, photos, *TRAIN, "--device", "cpu", "--out", out, "--quiet"]
    assert run_command(*words) == 0
    return out
