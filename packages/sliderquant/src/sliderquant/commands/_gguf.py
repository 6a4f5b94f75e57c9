"""A native folder as a file for llama.cpp, and what the file's float16 scales cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from effml_common.errors import InputError
from effml_common.logging import Progress, say, warn
from sliderquant.adapters.gguf import FILE_NAME, Parameter, check_gguf, write_gguf
from sliderquant.adapters.gguf_blocks import GgufWeight, gguf_weight
from sliderquant.adapters.input_files import InputFiles
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.native import base_config, native_formats
from sliderquant.adapters.native_parameters import native_layers, parameter_name, read_parameter
from sliderquant.commands._out_folder import write_identity
from sliderquant.commands.bench import unpack_layers_
from sliderquant.commands.eval import text_perplexity
from sliderquant.config import ExportConfig
from sliderquant.method.packing import SHAPE
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


@dataclass(frozen=True, kw_only=True)
class GgufCost:
    """What the file's float16 numbers changed.

    Attributes:
        changed: Share of the quantized weights that have another value in the file.
        largest: Largest change of a weight, in steps of its grid.
        perplexity: Before and after by the text's name, if asked for.
    """

    changed: float
    largest: float
    perplexity: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "changed": self.changed,
            "largest": self.largest,
            "perplexity": {name: list(pair) for name, pair in self.perplexity.items()},
        }

    def describe(self) -> str:
        """Return it in a line."""
        if not self.changed:
            return "every weight keeps its value"
        texts = [
            f"perplexity {name} {before:.4g} -> {after:.4g}"
            for name, (before, after) in self.perplexity.items()
        ]
        measured = ", ".join(texts) or "add --text FILE to measure what that costs"
        change = f"{self.changed:.1%} of the weights change, by up to {self.largest:.2g} of a step"
        return f"{change}: {measured}"


def export_gguf(
    config: ExportConfig,
    source: Path,
    out: Path,
    raw: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> GgufCost:
    """Write ``model.gguf`` of a native folder.

    Args:
        config: Settings of the export.
        source: The native folder.
        out: Folder to write.
        raw: The source's ``config.json``.
        identity: What ``out`` belongs to; noted before the file appears.

    Raises:
        InputError: If llama.cpp has no counterpart for the model, the tokenizer or the codes, or the
            library ``gguf`` is missing.
    """
    # Everything that can be refused is, before anything is written.
    try:
        import gguf  # noqa: F401 - its absence is found before work
    except ImportError:
        raise InputError("GGUF files need gguf; pip install 'sliderquant[gguf]'") from None
    parsed = check_gguf(base_config(source, raw))
    formats, _ = native_formats(source, raw)
    parameters = _parameters(source, formats)
    if (out / FILE_NAME).exists() or (out / "config.json").exists():
        raise InputError(f"{out} holds a model already; choose another --out")
    write_identity(out, identity)

    # One tensor at a time; what changes is counted on the way.
    total = changed = 0
    largest = 0.0
    with Progress("exporting to gguf", len(parameters)) as bar:
        stored = write_gguf(out / FILE_NAME, parsed, source, parameters, bar.advance)
        for _, in_file, weight in stored:
            steps = _steps_apart(in_file, weight)
            total, changed = total + steps.numel(), changed + int((steps > 0).sum())
            largest = max(largest, float(steps.max()))

    # The price of what changed, on the user's text.
    perplexity = {}
    if changed and config.text:
        perplexity = _perplexities(source, config.text)
    elif config.text:
        say("every weight keeps its value, so nothing is measured")
    elif changed:
        warn(f"{changed / total:.1%} of the weights change; quantize --for gguf keeps them")
    return GgufCost(changed=changed / max(total, 1), largest=largest, perplexity=perplexity)


def _parameters(source: Path, formats: Mapping[str, WeightFormat]) -> dict[str, Parameter]:
    """Return what can be read from a native folder, by the names of transformers."""
    parameters = {}
    for layer, files in native_layers(source).items():
        name = parameter_name(layer, formats)
        parameters[name] = _parameter(layer, files, formats.get(name))
    return parameters


def _parameter(layer: str, files: Mapping[str, Path], fmt: WeightFormat | None) -> Parameter:
    suffix = SHAPE if fmt else ""
    with safe_open(files[suffix], framework="pt") as file:
        stored = file.get_slice(f"{layer}.{suffix}" if suffix else layer)
        shape = file.get_tensor(f"{layer}.{suffix}").tolist() if fmt else stored.get_shape()
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(
            stored.get_dtype(), torch.float32
        )
    return Parameter(
        shape=tuple(shape), fmt=fmt, dtype=dtype, read=lambda: read_parameter(layer, files, fmt)
    )


def _steps_apart(in_file: GgufWeight, weight: QuantizedWeight) -> torch.Tensor:
    """Return by how many steps of the grid each weight changed."""
    step = weight.scale.float().repeat_interleave(
        weight.codes.shape[-1] // weight.scale.shape[-1], dim=-1
    )
    return (in_file.values - weight.dequantize().float()).abs() / step


@torch.no_grad()
def _perplexities(source: Path, texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the perplexity of the folder and of the file's weights, on each text."""
    loaded = load_any(source)
    files = InputFiles().read(texts, "text")
    before = {file.name: text_perplexity(loaded, file) for file in files}
    unpack_layers_(loaded.model, lambda weight: gguf_weight(weight).values)
    return {file.name: (before[file.name], text_perplexity(loaded, file)) for file in files}
