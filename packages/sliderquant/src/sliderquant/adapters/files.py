"""Model directories of transformers: checked loading, atomic writing."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from effml_common.errors import InputError
from effml_common.logging import say, warn
from sliderquant.adapters.families import FAMILIES, family_of
from sliderquant.adapters.formats import MARK
from sliderquant.adapters.reasons import input_errors
from sliderquant.adapters.weights import (
    RENAMED_PREFIXES,
    language_name,
    language_tensors,
    refuse_missing,
    refuse_shape,
    warn_of_unused,
)

# How attention is computed without further packages, in any type; ``None`` lets transformers choose.
PLAIN_ATTENTION = (None, "eager", "sdpa")
CODE_REMEDY = (
    "it comes with Python code of its own: read that, and add --trust-remote-code to sliderquant "
    "quantize, the only command that runs it"
)
# Everything beside weights and config.json that a loader or a server reads.
COMPANION_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "additional_chat_templates", "generation_config.json"),
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checked model directory.

    Attributes:
        model: The model in eval mode, in float32 or in the type that was asked for.
        tokenizer: Its tokenizer.
        dtype: Type of the weights on disk; what is exported has it too.
        context: Longest sequence the model supports, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    context: int


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and advice for the duration: we report ourselves."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(
    directory: str | Path, trust_remote_code: bool = False, allow_rounded: bool = False
) -> PreTrainedConfig:
    """Read and check a model directory's ``config.json``.

    Args:
        directory: Local Hugging Face directory.
        trust_remote_code: Run Python code that comes with the model.
        allow_rounded: Accept a model that was quantized and stored dequantized, to measure it.

    Raises:
        InputError: If it is missing, unreadable, of a quantized model, or of an unsupported family.
    """
    # A config of a full-precision model that transformers can read.
    directory = Path(directory)
    raw = read_raw_config(directory)
    if not allow_rounded:
        _refuse_quantized(directory, raw)
    remedy = CODE_REMEDY if _has_code(raw) and not trust_remote_code else "restore it"
    with input_errors(f"{directory}/config.json cannot be read", remedy), quiet_transformers():
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )

    # The language model in it, of a family that is known, computed with what is installed.
    with input_errors(f"{directory}/config.json cannot be read", "restore it"):
        language = _language_config(config)
    family_of(language.model_type)
    if language.num_hidden_layers < 1:
        raise InputError(
            f"{directory}/config.json: num_hidden_layers is {language.num_hidden_layers}; "
            "give a model with 1 or more"
        )
    if language is not config:
        say(
            f"{directory}: {config.model_type} is read for its language part, {language.model_type}"
        )
    if getattr(language, "quantization_config", config) is None:
        delattr(language, "quantization_config")
    if (attention := language._attn_implementation) not in PLAIN_ATTENTION:
        warn(f"config.json asks for {attention}; attention is computed without it")
        language._attn_implementation = None
    return language


def read_raw_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` as plain JSON.

    Raises:
        InputError: If the directory is no model, or the file no JSON object.
    """
    directory = check_directory(directory)
    with input_errors(f"{directory}/config.json cannot be read", "restore it"):
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
        return raw


def check_directory(directory: str | Path) -> Path:
    """Return the path of a model directory that has a config and no adapter.

    Raises:
        InputError: If it is not there, has no ``config.json``, or holds an adapter of PEFT.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"model directory {directory} does not exist; give a local directory (save one with "
            "save_pretrained)"
        )

    # transformers would load the adapter on top of the model, whose blocks then look different.
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"{directory} holds an adapter (adapter_config.json), which is not part of the weights; "
            "merge it first: merge_and_unload() of peft, then save_pretrained"
        )
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory} is no model directory, it has no config.json; "
            "give the folder that save_pretrained wrote"
        )
    return directory


def _has_code(raw: Any) -> bool:
    """Whether a plain config names Python code that comes with the model."""
    return isinstance(raw, dict) and "auto_map" in raw


def _language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the causal language model in a vision-language model, or the config itself.

    Raises:
        UnsupportedArchitectureError: If the language part is of a family that is not supported.
    """
    text = config.get_text_config()
    if config.model_type in FAMILIES or text is config:
        return config

    # The class of the whole model decides what is tied, and how attention is computed.
    family_of(text.model_type)
    text.tie_word_embeddings = config.tie_word_embeddings
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    text._attn_implementation = config._attn_implementation
    return text


def _refuse_quantized(directory: str | Path, raw: dict[str, Any]) -> None:
    """Refuse to quantize a model a second time, whatever format it is in.

    Args:
        directory: For the message.
        raw: Content of its ``config.json``.

    Raises:
        InputError: If the weights were rounded.
    """
    mark, parts = raw.get(MARK), (raw, raw.get("text_config"))
    quantized = any(
        part.get("quantization_config") is not None for part in parts if isinstance(part, dict)
    )
    if quantized or (isinstance(mark, dict) and mark.get("rounded")):
        raise InputError(
            f"{directory} is quantized already; quantize the full-precision model instead"
        )


def load_tokenizer(
    directory: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Raises:
        InputError: If it is missing or damaged.
    """
    remedy = "add its files"
    with contextlib.suppress(OSError, ValueError):
        raw = json.loads((Path(directory) / "tokenizer_config.json").read_text(encoding="utf-8"))
        remedy = CODE_REMEDY if _has_code(raw) and not trust_remote_code else remedy
    with input_errors(f"{directory} has no usable tokenizer", remedy), quiet_transformers():
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )


def load_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    allow_rounded: bool = False,
    *,
    upcast: bool = True,
) -> LoadedModel:
    """Load model and tokenizer from safetensors, never from the network or a pickle.

    Args:
        directory: Local Hugging Face directory.
        device: Torch device.
        allow_rounded: See ``load_config``.
        upcast: Load the weights in float32; else in the stored type.

    Raises:
        InputError: If a file is missing, damaged or does not fit, or a weight is NaN or infinite.
    """
    # Safetensors only, and nothing from the network.
    directory = Path(directory)
    config = load_config(directory, allow_rounded=allow_rounded)
    dtype = stored_dtype(directory)
    with input_errors(f"{directory} cannot be loaded", "restore its files"), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            key_mapping=RENAMED_PREFIXES,
            dtype=torch.float32 if upcast else dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # else transformers asks on the terminal
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
        model, info = loaded

    # transformers fills in what does not fit with random values; here it is an error, as is a NaN.
    for name, stored, expected in sorted(info["mismatched_keys"]):
        refuse_shape(directory, name, stored, expected)
    refuse_missing(info["missing_keys"], directory)
    warn_of_unused({language_name(name) for name in info["unexpected_keys"]}, directory)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"weight {name} holds NaN or infinity; use an intact checkpoint")

    return LoadedModel(
        model=model.to(device),
        tokenizer=load_tokenizer(directory),
        dtype=dtype,
        context=config.max_position_embeddings,
    )


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the floating type of the language model's first matrix on disk.

    Raises:
        InputError: If a file is damaged, or there is no matrix.
    """
    for name, tensor in language_tensors(directory).items():
        if len(tensor.shape) == 2 and name.startswith("model."):
            with (
                input_errors(f"{tensor.path} is damaged", "copy it again"),
                safe_open(tensor.path, framework="pt") as file,
            ):
                return file.get_tensor(tensor.name).dtype
    raise InputError(f"{directory} holds no weight matrix; it is no language model")
