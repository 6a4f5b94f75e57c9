"""The ``export`` command: a quantized model in another format, without loss."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effml_common.errors import InputError, memory_advice
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.locking import locked_folder
from effml_common.logging import Progress, say, warn
from sliderquant.adapters.files import read_raw_config
from sliderquant.adapters.formats import NATIVE_TYPE, check_expressible, written_dtype
from sliderquant.adapters.gguf import FILE_NAME
from sliderquant.adapters.gptq_layout import check_gptq
from sliderquant.adapters.hub import model_directory
from sliderquant.adapters.layer_bits import check_servable_folder
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.native import base_config, native_formats
from sliderquant.adapters.native_parameters import native_layers, parameter_name, read_parameter
from sliderquant.adapters.weights import stored_tensors, weight_files
from sliderquant.commands._gguf import GgufCost, export_gguf
from sliderquant.commands._model_card import base_model, gguf_card, history_of, model_card, sizes
from sliderquant.commands._out_folder import hash_of_files, read_identity, write_identity
from sliderquant.config import ExportConfig
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        out: Folder.
        format: Of the weights.
        files: Their names.
        bytes: Sizes on disk: ``directory``, and ``linears`` and ``bfloat16`` where layers are packed.
        cost: What the rounding of scales to float16 changed, for GGUF.
    """

    out: str
    format: str
    files: list[str]
    bytes: Mapping[str, float]
    cost: GgufCost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "out": Path(self.out).name,
            "format": self.format,
            "files": self.files,
            "bytes": self.bytes,
            "cost": None if self.cost is None else self.cost.to_json(),
        }

    def __rich__(self) -> str:
        """Return one line."""
        parts = f"{self.bytes['directory'] / 1e6:.1f} MB"
        if "linears" in self.bytes:
            packed, unpacked = self.bytes["linears"] / 1e6, self.bytes["bfloat16"] / 1e6
            parts += f", of that quantized layers {packed:.1f} MB ({unpacked:.1f} MB in 16 bits)"
        cost = "" if self.cost is None else f"; {self.cost.describe()}"
        return f"wrote {self.out} ({self.format}): {parts}{cost}"


def export(config: ExportConfig) -> ExportResult:
    """Write a native model in another format; every weight keeps its value, bit for bit.

    GGUF stores scales in float16: a weight keeps its value if it was quantized for that, and the result
    says what changed elsewhere.

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
    names = [parameter_name(layer, formats) for layer in native_layers(source)]
    plain = [name for name in names if name not in formats]
    check_expressible(config.format, formats, activations, plain)
    if config.format == "gptq":
        check_gptq(formats, names)
    if config.format == "compressed-tensors" and formats:
        check_servable_folder(base_config(source, raw), formats)

    # The folder belongs to one source and format; what was published is left as it is.
    main_file, cost = out / (FILE_NAME if config.format == "gguf" else "config.json"), None
    with locked_folder(out), memory_advice("use a machine with more memory"):
        identity = {
            "source (sha256)": hash_of_files([source / "config.json", *weight_files(source)]),
            "format": config.format,
            "container_bits": config.container_bits,
        }
        if main_file.is_file() and read_identity(out) == identity:
            if config.format != "gguf":
                stored_tensors(out)  # what was finished once may have lost a file since
            say(f"{out} is finished already and unchanged")
            if config.text:
                warn("text is measured while a file is written; choose another --out")
        elif config.format == "gguf":  # a file of its own, not a folder of safetensors
            cost = export_gguf(config, source, out, raw, identity)
        else:
            _write(out, source, config, identity)
        if not (out / "README.md").is_file():
            _write_card(out, source, raw, cost)

    files = sorted(path.name for path in out.iterdir() if path.is_file())
    is_gguf = config.format == "gguf"
    on_disk = {"directory": main_file.stat().st_size} if is_gguf else sizes(out)
    return ExportResult(out=str(out), format=config.format, files=files, bytes=on_disk, cost=cost)


def _write_card(out: Path, source: Path, raw: Mapping[str, Any], cost: GgufCost | None) -> None:
    """Write the model card, which keeps the history of the source."""
    base = base_model(source) or Path(raw.get("_name_or_path") or source.name).name
    if (out / FILE_NAME).is_file():
        remark = cost.describe() if cost else "scales are stored in float16"
        card = gguf_card(out, base, remark, history_of(source))
    else:
        card = model_card(out, base, history_of(source))
    atomic_write(out / "README.md", card)


def _write(out: Path, source: Path, config: ExportConfig, identity: Mapping[str, Any]) -> None:
    """Write the model; one block is read, converted and written at a time."""
    raw = read_raw_config(source)
    formats, activations = native_formats(source, raw)
    writer = ModelWriter(
        out,
        source,
        format=config.format,
        dtype=written_dtype(config.format, formats.values(), getattr(torch, raw["dtype"])),
        config=base_config(source, raw),
        activations=activations,
        container_bits=config.container_bits,
        identity=json.dumps(identity, sort_keys=True),
    )
    write_identity(out, identity)
    layers = native_layers(source)
    with Progress(f"exporting to {config.format}", len(layers)) as bar:
        for batch in _batches(layers, formats):
            writer.write(batch)
            bar.advance(len(batch))
    writer.publish()


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
            name = parameter_name(layer, formats)
            batch[name] = read_parameter(layer, layers[layer], formats.get(name))
        yield batch
