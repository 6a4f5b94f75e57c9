"""One thread, the helpers beside this file, and tiny pipelines as fixtures."""

import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))

from morse_tiny import tiny_pixels, tiny_sd, tiny_sdxl


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
