"""One thread, the helpers beside this file."""

import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves this folder out of the path; the helpers' names are unique.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
