"""The ``export`` command: a quantized model in another format, without loss."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effml_common.errors import InputError, memory_advice
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.locking import locked_folder
from effml_common.logging import Progress, say
from sliderquant.adapters.files import read_raw_config
from sliderquant.adapters.formats import NATIVE_TYPE, check_expressible
from sliderquant.adapters.hub import model_directory
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.native import base_config, native_formats
from sliderquant.adapters.weights import stored_tensors, weight_files
from sliderquant.commands._model_card import history_of, model_card, sizes
from sliderquant.commands._out_folder import hash_of_files, read_identity, write_identity
from sliderquant.config import ExportConfig
from sliderquant.method.packing import PACKED, SCALE, SHAPE, ZERO, unpacked_weight
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        out: Folder.
        format: Of the weights.
        files: Their names.
        bytes: Sizes on disk: ``directory``, and ``linears`` and ``bfloat16`` where layers are packed.
    """

    out: str
    format: str
    files: list[str]
    bytes: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "out": Path(self.out).name,
            "format": self.format,
            "files": self.files,
            "bytes": self.bytes,
        }

    def __rich__(self) -> str:
        """Return one line."""
        parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.bytes.items())
        return f"wrote {self.out} ({self.format}): {parts}"


def export(config: ExportConfig) -> ExportResult:
    """Write a native model in another format; every weight keeps its value, bit for bit.

    One layer is in memory at a time. An interrupted export continues when it is started again.

    Raises:
        InputError: If the source is no native model, is damaged, or the format cannot express it.
    """
    # Only the native format holds all that is needed.
    source, out = model_directory(config.model), run_folder(config.out, "export")
    raw = read_raw_config(source)
    if raw.get("model_type") != NATIVE_TYPE:
        raise InputError(
            f"{source} is no native model, and other formats do not hold all that is needed; "
            "quantize with --format native, and export from that"
        )
    formats, activations = native_formats(source, raw)
    check_expressible(config.format, formats, activations)

    # The folder belongs to one source and format; what was published is left as it is.
    with locked_folder(out), memory_advice("use a machine with more memory"):
        identity = {
            "source (sha256)": hash_of_files([source / "config.json", *weight_files(source)]),
            "format": config.format,
            "container_bits": config.container_bits,
        }
        if (out / "config.json").is_file() and read_identity(out) == identity:
            say(f"{out} is finished already and unchanged")
        else:
            _write(out, source, config, identity)
        if not (out / "README.md").is_file():
            base = raw.get("_name_or_path") or source.name
            card = model_card(out, Path(base).name, history_of(source))
            atomic_write(out / "README.md", card)
            say(f"wrote {out}")

    files = sorted(path.name for path in out.iterdir() if path.is_file())
    return ExportResult(out=str(out), format=config.format, files=files, bytes=sizes(out))


def _write(out: Path, source: Path, config: ExportConfig, identity: Mapping[str, Any]) -> None:
    """Write the model; one block is read, converted and written at a time."""
    raw = read_raw_config(source)
    formats, activations = native_formats(source, raw)
    writer = ModelWriter(
        out,
        source,
        format=config.format,
        dtype=getattr(torch, raw["dtype"]),
        config=base_config(source, raw),
        activations=activations,
        container_bits=config.container_bits,
        identity=json.dumps(identity, sort_keys=True),
    )
    write_identity(out, identity)
    layers = _layers(source)
    with Progress(f"exporting to {config.format}", len(layers)) as bar:
        for batch in _batches(layers, formats):
            writer.write(batch)
            bar.advance(len(batch))
    writer.publish()


def _layers(directory: Path) -> dict[str, dict[str, Path]]:
    """Return the files of every parameter's tensors: parameter -> suffix -> file."""
    layers: dict[str, dict[str, Path]] = {}
    for name, tensor in stored_tensors(directory).items():
        layer, _, suffix = name.rpartition(".")
        if suffix in (PACKED, SCALE, SHAPE, ZERO):
            layers.setdefault(layer, {})[suffix] = tensor.path
        else:
            layers[name] = {"": tensor.path}
    return layers


def _batches(
    layers: Mapping[str, Mapping[str, Path]], formats: Mapping[str, WeightFormat]
) -> Iterator[dict[str, QuantizedWeight | Tensor]]:
    """Yield parameters under their names, one decoder block at a time."""
    by_block: dict[str, list[str]] = {}
    for layer in layers:
        words = layer.split(".")
        block = words[2] if layer.startswith("model.layers.") else layer
        by_block.setdefault(block, []).append(layer)
    for inside in by_block.values():
        batch: dict[str, QuantizedWeight | Tensor] = {}
        for layer in inside:
            name = next((n for n in (layer, f"{layer}.weight") if n in formats), layer)
            batch[name] = _parameter(layer, layers[layer], formats.get(name))
        yield batch


def _parameter(
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
