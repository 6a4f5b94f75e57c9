"""The parameters of a native folder, read one by one."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from effml_common.errors import InputError
from sliderquant.adapters.weights import stored_tensors
from sliderquant.method.packing import PACKED, SCALE, SHAPE, ZERO, unpacked_weight
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


def native_layers(directory: Path) -> dict[str, dict[str, Path]]:
    """Return the files of every parameter's tensors: parameter -> suffix -> file."""
    layers: dict[str, dict[str, Path]] = {}
    for name, tensor in stored_tensors(directory).items():
        layer, _, suffix = name.rpartition(".")
        if suffix in (PACKED, SCALE, SHAPE, ZERO):
            layers.setdefault(layer, {})[suffix] = tensor.path
        else:
            layers[name] = {"": tensor.path}
    return layers


def parameter_name(layer: str, formats: Mapping[str, WeightFormat]) -> str:
    """Return the name in transformers of what ``native_layers`` calls ``layer``.

    Packed tensors are called after the layer; fused experts are parameters without a layer.
    """
    return next((name for name in (layer, f"{layer}.weight") if name in formats), layer)


def read_parameter(
    layer: str, files: Mapping[str, Path], fmt: WeightFormat | None
) -> QuantizedWeight | Tensor:
    """Read one parameter from the files of its tensors."""

    def read(suffix: str) -> Tensor:
        with safe_open(files[suffix], framework="pt") as file:
            return file.get_tensor(f"{layer}.{suffix}" if suffix else layer)

    try:
        if fmt is None:
            return read("")
        zero = None if fmt.sym else read(ZERO)
        columns = int(read(SHAPE)[-1])
        return unpacked_weight(read(PACKED), read(SCALE), zero, columns, fmt)
    except (KeyError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{layer} is not stored as its config says ({error}); copy it again"
        ) from None
