"""A tiny Llama of the real class, trained for seconds on the standard library, and its directory."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.config import DemoModelConfig
from sliderquant.demo_model import demo_model, library_corpus


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus():
    whole = library_corpus()
    return dataclasses.replace(
        whole, train=whole.train[:40], code=whole.code[:60_000], prose=whole.prose[:60_000]
    )


@pytest.fixture(scope="session")
def model_directory(corpus, tmp_path_factory) -> Path:
    """Five blocks of width 64: enough for every kind of window."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    config = DemoModelConfig(
        layers=5, hidden_size=64, context=64, vocab_size=384, train_steps=250, train_batch=8
    )
    directory = demo_model(config, corpus)
    patch.undo()
    return directory


@pytest.fixture
def model_copy(model_directory, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


@pytest.fixture(scope="session")
def text_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text("\n\n".join(corpus.train)[:200_000])
    return path


@pytest.fixture(scope="session")
def held_out_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(corpus.code[:20_000])
    return path


@pytest.fixture
def loaded(model_directory):
    return load_model(model_directory)


@pytest.fixture
def decoder(loaded) -> TransformersDecoder:
    return TransformersDecoder(loaded.model)
