"""Any model directory for measuring: full precision, or quantized in whatever format."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from effml_common.errors import InputError
from sliderquant.adapters.files import (
    LoadedModel,
    load_model,
    load_tokenizer,
    quiet_transformers,
    read_raw_config,
)
from sliderquant.adapters.formats import NATIVE_TYPE
from sliderquant.adapters.native import load
from sliderquant.adapters.reasons import input_errors, reason_of
from sliderquant.adapters.weights import refuse_missing
from sliderquant.method.packed import PackedWeight


def load_any(
    directory: str | Path, device: torch.device | str = "cpu", *, upcast: bool = True
) -> LoadedModel:
    """Load a model directory for evaluation.

    Args:
        directory: Local Hugging Face directory, or a native one.
        device: Torch device.
        upcast: Compute in float32 with the stored values; else in the stored type.

    Raises:
        InputError: If it cannot be loaded.
    """
    # Models in full precision have a loader of their own, which checks every weight.
    directory = Path(directory)
    raw = read_raw_config(directory)
    native = raw.get("model_type") == NATIVE_TYPE
    if not native and raw.get("quantization_config") is None:
        return load_model(directory, device, allow_rounded=True, upcast=upcast)

    # Packed weights stay packed; what is computed with them is float32 if asked.
    if native:
        model = load(directory, torch.device(device))
    else:
        model = _load_compressed(directory, raw["quantization_config"], device)
    dtype = model.dtype
    if upcast:
        _cast_(model, torch.float32)
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(directory),
        dtype=dtype,
        context=model.config.max_position_embeddings,
    )


def _load_compressed(
    directory: Path, quantization: Any, device: torch.device | str
) -> PreTrainedModel:
    """Load what transformers' own quantizers load; compressed-tensors unpacks at the first pass."""
    if not isinstance(quantization, dict):
        raise InputError(
            f"{directory}/config.json: quantization_config is {quantization!r}; restore it"
        )

    # compressed-tensors draws four progress bars on stderr.
    with (
        input_errors(f"{directory} cannot be loaded", "restore its files"),
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # else transformers asks on the terminal
                output_loading_info=True,
            )
        except ImportError as error:
            remedy = "install it"
            if quantization.get("quant_method") == "compressed-tensors":
                remedy = "pip install 'sliderquant[ct]'"
            raise InputError(
                f"{directory} needs another library ({reason_of(error)}); {remedy}"
            ) from None
        model, info = loaded

        # transformers fills in what is missing with random values; here it is an error.
        refuse_missing(info["missing_keys"], directory)

        # The first pass unpacks the weights; a model that cannot compute is found here.
        model = model.to(device).eval()
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return model


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters and what packed weights unpack to, but not rotary tables and packed scales."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.like = module.like.to(dtype)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
