"""The models and texts that sliderquant and its peers are compared on.

``llama`` is the demo's model. ``qwen`` is a Qwen3 of the same size, with norms on queries and keys,
trained on the same text: nothing is tuned on it. ``llama-outliers`` computes what ``llama`` computes,
but a few of its channels carry large values, as those of large models do and those of small ones do
not; so does ``qwen-outliers``. All are kept in the user's cache folder.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from effml_common.files import atomic_write
from effml_common.logging import say
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.text import begin_tokens, encode
from sliderquant.config import DemoModelConfig
from sliderquant.demo.data import Corpus, library_corpus
from sliderquant.demo.models import demo_model, encode_documents, train_language_model_

OUTLIER_CHANNELS = 4  # of the residual stream, and of each MLP's inner width
OUTLIER_FACTORS = (20.0, 50.0)
SAME_LOGITS = 1e-4
# Norms, and the layers that read what they put out.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def subject(family: str, config: DemoModelConfig) -> Path:
    """Return the directory of a model, made on the first call.

    Args:
        family: "llama" or "qwen", or one of them with "-outliers" behind it.
        config: Shape and training budget.

    Raises:
        NonFiniteError: If training diverges.
        ValueError: If outlier channels change what the model computes.
    """
    corpus = library_corpus()
    llama = demo_model(config, corpus)
    if family == "llama":
        return llama
    # Settings, text and library versions are in the name of the Llama's folder already.
    target = llama.with_name(llama.name.replace("llama", family, 1))
    if not (target / "config.json").exists():
        base = family.removesuffix("-outliers")
        if base == family:
            _keep(_train_qwen(config, corpus, llama), llama, target)
        else:
            model = load_model(subject(base, config)).model
            add_outliers_(model, torch.Generator().manual_seed(config.model_seed))
            _keep(model, llama, target)
    return target


def _train_qwen(config: DemoModelConfig, corpus: Corpus, llama: Path) -> PreTrainedModel:
    """Train a Qwen3 with the Llama's tokenizer and budget."""
    say(f"training a {config.layers}-block Qwen3 once; it is kept in the user cache folder")

    # The same sizes as the Llama.
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(config.model_seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=config.hidden_size // 4,
            max_position_embeddings=config.context,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )

    train_language_model_(model, config, encode_documents(tokenizer, corpus.train))
    return model


def _keep(model: PreTrainedModel, llama: Path, target: Path) -> None:
    """Write a model beside the Llama, all of it or nothing."""
    staging = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(llama).save_pretrained(staging)
    try:
        staging.rename(target)
    except OSError:  # another process made the same model meanwhile: theirs is as good
        shutil.rmtree(staging)


@torch.no_grad()
def add_outliers_(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Make a few channels large without changing what the model computes.

    A norm's gain times f, and the columns that read that channel divided by f; a row of up_proj times
    f, and the column of down_proj divided by f. The channels of the residual stream are the same in
    all blocks.

    Args:
        model: A Llama or Qwen3, changed in place.
        generator: Of channels and factors.

    Raises:
        ValueError: If any logit changes by more than 1e-4.
    """
    tokens = torch.randint(model.config.vocab_size, (4, 32), generator=generator)
    before = model(input_ids=tokens, use_cache=False).logits

    # Gains and columns of the residual stream; rows and columns of the MLPs.
    channels = torch.randperm(model.config.hidden_size, generator=generator)[:OUTLIER_CHANNELS]
    for block in TransformersDecoder(model).blocks:
        for norm, readers in READERS.items():
            factors = _factors(generator)
            _weight(block, norm)[channels] *= factors
            for reader in readers:
                _weight(block, reader)[:, channels] /= factors
        up, down = _weight(block, "mlp.up_proj"), _weight(block, "mlp.down_proj")
        inner = torch.randperm(len(up), generator=generator)[:OUTLIER_CHANNELS]
        factors = _factors(generator)
        up[inner] *= factors[:, None]
        down[:, inner] /= factors
    change = float((model(input_ids=tokens, use_cache=False).logits - before).abs().max())
    if not change <= SAME_LOGITS:
        raise ValueError(f"outlier channels change a logit by {change:.1e}")


def _factors(generator: torch.Generator) -> Tensor:
    low, high = OUTLIER_FACTORS
    return low + (high - low) * torch.rand(OUTLIER_CHANNELS, generator=generator)


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A model and the text that goes with it.

    Attributes:
        folder: Of the model.
        tokens: "train" to calibrate on, "code", "prose" and "development" to measure on.
        begin: Token ids in front of every sample and chunk.
    """

    folder: Path
    tokens: dict[str, Int[Tensor, " n"]]
    begin: Sequence[int] = ()


def prepare(family: str, config: DemoModelConfig, path: Path) -> None:
    """Make a model and encode the text once, which takes more memory than quantizing does.

    Args:
        family: As for ``subject``.
        config: Shape and training budget.
        path: File to write; ``read_material`` reads it.
    """
    folder = subject(family, config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = library_corpus()
    tokens = {
        "train": encode(corpus.train, tokenizer),
        "code": encode([corpus.code], tokenizer),
        "prose": encode([corpus.prose], tokenizer),
        "development": encode([corpus.development], tokenizer),
    }
    begin = json.dumps(begin_tokens(tokenizer))
    atomic_write(path, save(tokens, metadata={"folder": str(folder), "begin": begin}))


def read_material(path: Path) -> Material | None:
    """Return what ``prepare`` wrote, or ``None`` if it, a part of it, or its model is not there."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tokens = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "begin" not in metadata or not (Path(metadata["folder"]) / "config.json").exists():
        return None
    begin = json.loads(metadata["begin"])
    return Material(folder=Path(metadata["folder"]), tokens=tokens, begin=begin)
