"""A tiny Llama trained for seconds, with its directory, and tiny random models of every family."""

import dataclasses
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from effml_common.logging import set_quiet
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.streaming import empty_model
from sliderquant.config import DemoModelConfig
from sliderquant.demo.data import library_corpus
from sliderquant.demo.models import demo_model

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules beside this file

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    # head_dim differs from hidden / heads, as in the released small models.
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 4, "layer_types": _MIXED}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4, "layer_types": _MIXED}),
    "phi3": (Phi3Config, {}),
    # Phi-4-mini turns three quarters of a head and ties its embeddings.
    "phi4": (Phi3Config, {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``family`` runs once for each of them.

    A module with ``FIRST_FAMILIES`` leaves the others to the slow tests.
    """
    if "family" in metafunc.fixturenames:
        first = getattr(metafunc.module, "FIRST_FAMILIES", FAMILIES)
        marks = {name: [] if name in first else [pytest.mark.slow] for name in FAMILIES}
        metafunc.parametrize("family", [pytest.param(n, marks=m) for n, m in marks.items()])


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """Return a random model in which every part matters: gains off one, biases off zero."""
    made, extra = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**{**_SIZES, **extra, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture
def tiny():
    """Makes a tiny random model of a family: ``tiny("llama", tie_word_embeddings=True)``."""
    return tiny_model


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, VOCABULARY, (4, 12), generator=generator)


class FakeCard:
    """A CUDA device without one: tensors have shapes and devices, no values; mismatches raise."""

    device = torch.device("cuda:0")

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor on the card."""
        return FakeTensor(self.mode, torch.empty(shape, dtype=dtype, device="meta"), self.device)

    def tensors(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Parameters of a module, as they would be on the card."""
        return {n: self.tensor(*p.shape, dtype=p.dtype) for n, p in module.named_parameters()}

    def take(self, module: torch.nn.Module) -> torch.nn.Module:
        """Put parameters and buffers of a module on the card, in place."""
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    if value is not None:
                        moved = self.tensor(*value.shape, dtype=value.dtype)
                        wrap = isinstance(value, torch.nn.Parameter)
                        held[name] = torch.nn.Parameter(moved) if wrap else moved
        return module


class StreamedToCard:
    """Parameters that arrive on the card; the model around them is empty, its buffers on the host."""

    def __init__(self, model: PreTrainedModel, card: FakeCard) -> None:
        self.model, self.card, self.device = model, card, card.device

    def block(self, block: int) -> dict[str, torch.Tensor]:
        return self.card.tensors(self.model.model.layers[block])

    def outside(self, head: bool = True) -> dict[str, torch.Tensor]:
        return {
            name: self.card.tensor(*parameter.shape, dtype=parameter.dtype)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith("model.layers.") and (head or name != "lm_head.weight")
        }


@pytest.fixture
def fake_card(monkeypatch):
    """A fake CUDA device, inside its mode."""
    card = FakeCard()
    # Module.to cannot exchange parameters for fake ones.
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: card.take(module))
    with card.mode:
        yield card


@pytest.fixture
def fake_decoder(fake_card):
    """Makes a tiny model of a family whose parameters are streamed to the fake card."""

    def make(family: str, **changes) -> TransformersDecoder:
        with unset_fake_temporarily():
            made, extra = FAMILIES[family]
            model = empty_model(made(**{**_SIZES, **extra, **changes}))
        return TransformersDecoder(model, StreamedToCard(model, fake_card))

    return make


TEXT = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(1500))


@pytest.fixture
def save(tiny, tmp_path):
    """Writes a tiny model of a family, with a tokenizer of one token per character."""

    def write(family: str, **changes) -> Path:
        directory = tmp_path / "source"
        tiny(family, **changes).save_pretrained(directory)
        vocabulary = {chr(33 + i): i + 1 for i in range(90)} | {"<unk>": 0}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
            directory
        )
        (tmp_path / "text.txt").write_text(TEXT)
        return directory

    return write


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def not_quiet() -> None:
    """A command that an earlier test ran with --quiet leaves this process quiet."""
    set_quiet(False)


@pytest.fixture(autouse=True, scope="session")
def float32_on_any_processor():
    """Tests compare with equations; what a processor computes in bfloat16 has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(scope="session")
def corpus():
    whole = library_corpus()
    return dataclasses.replace(
        whole, train=whole.train[:40], code=whole.code[:60_000], prose=whole.prose[:60_000]
    )


@pytest.fixture(scope="session")
def model_directory(corpus, tmp_path_factory) -> Path:
    """Five blocks of width 64: enough for every kind of window."""
    config = DemoModelConfig(
        layers=5, hidden_size=64, context=64, vocab_size=384, train_steps=200, train_batch=8
    )
    # Workers of pytest-xdist share one model: the first trains it, the others wait.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "sliderquant.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        return demo_model(config, corpus)


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
    path.write_text(corpus.code[:6_000])
    return path


@pytest.fixture
def loaded(model_directory):
    return load_model(model_directory)


@pytest.fixture
def with_begin():
    """Makes a tokenizer put tokens in front of a text, and more behind it."""

    def change(tokenizer, front: str = "<|end|>", behind: str = ""):
        pieces = [*front.split(), "$A", *behind.split()]
        tokens = {piece for piece in pieces if piece != "$A"}
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in sorted(tokens)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(pieces), special_tokens=ids
        )
        return tokenizer

    return change


@pytest.fixture
def decoder(loaded) -> TransformersDecoder:
    return TransformersDecoder(loaded.model)
