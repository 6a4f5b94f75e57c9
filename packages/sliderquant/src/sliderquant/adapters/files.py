"""Model directories of transformers: checked loading, atomic writing."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from effml_common.errors import InputError
from sliderquant.adapters.families import family_of
from sliderquant.adapters.formats import MARK

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
    # A directory with a config.
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"model directory {directory} does not exist; give a local directory (save one with "
            "save_pretrained)"
        )
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory} is no model directory, it has no config.json; "
            "give the folder that save_pretrained wrote"
        )

    # A config of a full-precision model that transformers can read, of a family that is known.
    try:
        raw = json.loads((directory / "config.json").read_text())
        if not allow_rounded:
            _refuse_quantized(directory, raw)
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except InputError:
        raise
    except Exception as error:  # a config class may raise anything about a wrong value
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{directory}/config.json cannot be read ({reason}); restore it") from None
    family_of(config.model_type)
    return config


def _refuse_quantized(directory: str | Path, raw: Any) -> None:
    """Refuse to quantize a model a second time, whatever format it is in.

    Args:
        directory: For the message.
        raw: Content of its ``config.json``.

    Raises:
        InputError: If the weights were rounded.
    """
    if not isinstance(raw, dict):
        return  # no config at all, which its reader will say
    mark = raw.get(MARK)
    if "quantization_config" in raw or (isinstance(mark, dict) and mark.get("rounded")):
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
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{directory} has no usable tokenizer ({reason}); add its files") from None


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
    dtype = _stored_dtype(directory)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32 if upcast else dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # else transformers asks on the terminal
                output_loading_info=True,
            )
        model, info = loaded
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{directory} cannot be loaded ({reason}); restore its files") from None

    # transformers fills in what is missing with random values; here it is an error, as is a NaN.
    if info["missing_keys"]:
        raise InputError(
            f"{directory} lacks {len(info['missing_keys'])} weights, such as "
            f"{sorted(info['missing_keys'])[0]}; restore its files"
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"weight {name} holds NaN or infinity; use an intact checkpoint")

    return LoadedModel(
        model=model.to(device),
        tokenizer=load_tokenizer(directory),
        dtype=dtype,
        context=config.max_position_embeddings,
    )


def weight_files(directory: str | Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted.

    Raises:
        InputError: If there is none; pickled weights are never loaded.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{directory} holds no safetensors weights; convert it once with "
            "save_pretrained (pickled weights are not loaded)"
        )
    return files


def _stored_dtype(directory: Path) -> torch.dtype:
    """Return the floating type of the first matrix on disk; also finds damaged headers."""
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensor = file.get_slice(name)
                    if len(tensor.get_shape()) == 2:
                        return file.get_tensor(name).dtype
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is damaged ({reason}); copy it again") from None
    raise InputError(f"{directory} holds no weight matrix; it is no language model")
