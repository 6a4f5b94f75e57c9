"""The native format: a model whose linear layers stay packed, also in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from effml_common.device import resolve_device
from effml_common.errors import InputError
from sliderquant.adapters.families import family_of
from sliderquant.adapters.files import read_raw_config
from sliderquant.adapters.formats import MARK, NATIVE_TYPE, NATIVE_VERSION, described_format
from sliderquant.adapters.reasons import input_errors
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.adapters.streaming import EMBEDDING, HEAD, empty_model
from sliderquant.adapters.weights import stored_tensors
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.packed import PackedLinear, pack_parameter_
from sliderquant.method.quantizer import WeightFormat

INDEX = "sliderquant.safetensors.index.json"


def load(
    directory: str | Path,
    device: torch.device | str = "cpu",
    *,
    kernel: Literal["torch", "triton"] = "torch",
) -> PreTrainedModel:
    """Load a native model directory; linear layers stay packed.

    Args:
        directory: Written by ``sliderquant quantize --format native`` or ``sliderquant export``.
        device: A device, or a name as for --device.
        kernel: "triton" multiplies few rows at a time (decoding) without unpacking the weight first;
            needs a GPU, and has been run under Triton's interpreter only.

    Returns:
        A transformers model in eval mode, for ``generate`` and forward passes. If activations belong
        to what was calibrated, they are rounded.

    Raises:
        InputError: If the directory is no native model, a file is missing or damaged, or the device
            is not there.
    """
    # What the directory says about itself.
    directory = Path(directory)
    target = resolve_device(device) if isinstance(device, str) else device
    raw = read_raw_config(directory)
    if raw.get("model_type") != NATIVE_TYPE:
        raise InputError(
            f"{directory} is no native sliderquant model; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    formats, activations = native_formats(directory, raw)
    base = base_config(directory, raw)
    family_of(base["model_type"])

    # An empty model, whose weights are replaced by packed ones.
    with input_errors(f"{directory}/config.json describes no model", "restore it"):
        model = empty_model(AutoConfig.for_model(**base))
    with input_errors(f"{directory}/config.json names a weight that the model lacks", "restore it"):
        for name, fmt in formats.items():
            _replace_by_packed_(model, name, fmt, kernel == "triton")

    # Tensors from the files; then the model is ready for ``generate``.
    _fill_(model, directory, target)
    if activations is not None:
        ActivationRounding(model.model.layers, model.config, activations)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.save_pretrained = _no_saving
    return model.requires_grad_(False)


def base_config(directory: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the model as it was before it was packed.

    Raises:
        InputError: If the config does not say what it was.
    """
    if not isinstance(raw.get("base_model_type"), str):
        raise InputError(f"{directory}/config.json has no base_model_type; restore it")
    own = ("quantization_config", "base_model_type", MARK)
    kept = {key: value for key, value in raw.items() if key not in own}
    return kept | {"model_type": raw["base_model_type"]}


def native_formats(
    directory: Path, raw: Mapping[str, Any]
) -> tuple[dict[str, WeightFormat], ActivationFormat | None]:
    """Return the formats of all packed weights, by parameter name, and of activations.

    Raises:
        InputError: If the version is not this one, or an entry is not what was written.
    """
    try:
        quantization = raw["quantization_config"]
        if quantization["sliderquant_version"] != NATIVE_VERSION:
            raise ValueError(f"version {quantization['sliderquant_version']}, not {NATIVE_VERSION}")
        dtype = getattr(torch, raw["dtype"])
        formats = {
            name: described_format(entry, dtype) for name, entry in quantization["weights"].items()
        }
        rounding = quantization["activations"]
        if rounding is None:
            return formats, None
        exact = frozenset(rounding.get("exact_inputs", ()))
        return formats, ActivationFormat(**{**rounding, "exact_inputs": exact})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory}/config.json does not say how its weights are packed ({error}); export again"
        ) from None


def _replace_by_packed_(model: PreTrainedModel, name: str, fmt: WeightFormat, kernel: bool) -> None:
    """Put a packed stand-in where the parameter was."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    columns = module.get_parameter(last).shape[-1]
    if columns % fmt.columns_per_group(columns):
        raise ValueError(f"{name}: {columns} columns, groups of {fmt.group_size}")
    if isinstance(module, nn.Linear):
        model.set_submodule(path, PackedLinear(module, fmt, kernel))
    else:
        pack_parameter_(module, last, fmt)


def _fill_(model: PreTrainedModel, directory: Path, device: torch.device) -> None:
    """Read every tensor from the files into its place."""
    # The tensors that are still to come; a tied head is the embedding.
    state = model.state_dict()
    modules = dict(model.named_modules())  # get_submodule would trip over fused experts' properties
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)

    # Every tensor of the files has a place, and every place gets a tensor.
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored_tensors(directory).items():
        by_file.setdefault(tensor.path, []).append(name)
    for path, names in by_file.items():
        with (
            input_errors(f"{path} is damaged", "copy it again"),
            safe_open(path, framework="pt", device=str(device)) as file,
        ):
            for name in names:
                if name not in state:
                    raise InputError(f"{path} holds {name}, which the model lacks; export again")
                _put_(modules, name, file.get_tensor(name), state.pop(name), path)
    if state:
        raise InputError(
            f"{directory} lacks {len(state)} tensors, such as {sorted(state)[0]}; restore its files"
        )

    # What is in no file: a tied head, rotary tables and the like.
    if model.config.tie_word_embeddings:
        _put_(modules, HEAD, model.get_parameter(EMBEDDING).data, None, directory)
    for module in modules.values():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _put_(
    modules: Mapping[str, nn.Module],
    name: str,
    tensor: Tensor,
    expected: Tensor | None,
    path: Path,
) -> None:
    """Put a tensor into a module, if it is of the expected shape and kind."""
    integers = expected is not None and not expected.is_floating_point()
    if expected is not None and (
        tensor.shape != expected.shape or tensor.is_floating_point() == integers
    ):
        raise InputError(
            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, its config asks for "
            f"{list(expected.shape)}; export again"
        )
    place, _, last = name.rpartition(".")
    module = modules[place]
    if last in module._buffers:
        module._buffers[last] = tensor
    else:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)


def _no_saving(*_: Any, **__: Any) -> NoReturn:
    raise InputError(
        "a packed model is not saved again; copy its directory, or use sliderquant export"
    )
