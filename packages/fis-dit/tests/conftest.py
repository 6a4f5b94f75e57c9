"""One thread, the helpers beside this file, and tiny models and pipelines as fixtures."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from fis_dit_pipelines import make_wan
from fis_dit_tiny import FAMILIES, Family, wan


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """A test that asks for it runs once for every supported kind of model."""
    return FAMILIES[request.param]()


@pytest.fixture
def tiny() -> Callable[..., Family]:
    """Makes a tiny random model: ``tiny("wan", depth=6)``."""
    return lambda name, **settings: FAMILIES[name](**settings)


@pytest.fixture
def tiny_wan() -> Family:
    return wan()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a package that two pipelines want, where it is missing; prompts here are clean."""
    from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_vace

    stand_in = SimpleNamespace(fix_text=lambda text: text)
    for module in (pipeline_wan_i2v, pipeline_wan_vace):
        monkeypatch.setattr(module, "ftfy", stand_in, raising=False)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "first.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(path)
    return str(path)


@pytest.fixture
def wan_directory(tmp_path: Path) -> Path:
    make_wan().save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"
