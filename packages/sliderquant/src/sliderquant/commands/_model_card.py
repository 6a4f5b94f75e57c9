"""The model card: a README.md beside the weights that says what they are and how to load them."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from effml_common.errors import InputError
from sliderquant.adapters.formats import MARK
from sliderquant.adapters.gguf import FILE_NAME
from sliderquant.adapters.weights import tensor_bytes, weight_files
from sliderquant.commands._measurements import describe_setting
from sliderquant.config import QuantizeConfig, SliderConfig
from sliderquant.method_config import FOREIGN_SETTINGS, TRAINING_SETTINGS

HISTORY_TITLE = "## How it was made"
_PACKED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
)


def sizes(directory: str | Path) -> dict[str, float]:
    """Return what a model directory takes on disk, in bytes.

    Returns:
        ``linears`` (packed layers with their scales; absent where nothing is packed), ``bfloat16`` (the
        same layers unpacked in 16 bits) and ``directory`` (all weight files).
    """
    directory = Path(directory)
    tensors = tensor_bytes(directory)
    files = sum(path.stat().st_size for path in weight_files(directory))
    entries, in_bytes = _quantized_entries(directory)
    packed = sum(size for name, size in tensors.items() if name.endswith(_PACKED)) + in_bytes
    if not packed:
        return {"directory": files}
    return {"linears": packed, "bfloat16": 2 * entries, "directory": files}


def _quantized_entries(directory: Path) -> tuple[int, int]:
    """Return the number of quantized weights, and of those that are stored one per byte."""
    total = in_bytes = 0
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = [name for name in names if name.endswith(".weight_shape")]
            total += sum(math.prod(file.get_tensor(name).tolist()) for name in shapes)
            slices = [file.get_slice(name) for name in names if name.endswith(".weight")]
            in_bytes += sum(math.prod(s.get_shape()) for s in slices if s.get_dtype() == "I8")
            # The gptq layout has no shapes: a column of codes per output, an entry of g_idx per input.
            for name in (name for name in names if name.endswith(".qweight")):
                outputs = file.get_slice(name).get_shape()[1]
                inputs = file.get_slice(name.replace(".qweight", ".g_idx")).get_shape()[0]
                total += inputs * outputs
    return total + in_bytes, in_bytes


def history_section(
    config: QuantizeConfig,
    report: Mapping[str, Any],
    begin: str,
    data: Mapping[str, str],
    part: str | None = None,
    bits: str = "",
) -> str:
    """Return the part of the card that stays the same in every format: how the model was made.

    Args:
        config: Settings of the run that quantized the model.
        report: Of that run, as JSON; its rows are the figures.
        begin: What every sample and chunk starts with, see ``begin_note``.
        data: The sha256 of what was read of each calibration file, by its name.
        part: What of the original was quantized, if not all of it.
        bits: How many layers have how many bits, if they differ.
    """
    # What ran, with what, on what.
    environment = report["environment"]
    libraries = {"python": environment["python"], "torch": environment["torch"]}
    libraries |= environment["libraries"]

    # The same in Markdown.
    lines = [
        HISTORY_TITLE,
        "",
        f"{_way(config)}, {report['package']} {report['version']}: {describe_setting(config)}.",
        "",
        *([f"{part} was quantized; images cannot be read.", ""] if part else []),
        *([f"Bits: {_literal(bits)}.", ""] if bits else []),
        *_table(report["rows"]),
        "Parameters of the released code:" if config.parameters else "Calibration data:",
        "",
        *(f"- `{name}` (sha256 `{digest}`)" for name, digest in data.items()),
        "",
        f"In {'' if config.parameters else 'calibration and '}measurement {_literal(begin)}.",
        "",
        _listing("Settings", _settings(config)),
        "",
        _listing("Libraries", libraries),
        "",
    ]
    return "\n".join(lines)


def history_in_memory(config: SliderConfig, tokens: Int[Tensor, "n t"]) -> str:
    """Return the same part of the card for a model that was quantized on tokens in memory.

    Args:
        config: Settings of the method.
        tokens: Calibration samples, int64 on the CPU.
    """
    names = ("sliderquant", "torch", "transformers", "tokenizers")
    digest = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    lines = [
        HISTORY_TITLE,
        "",
        f"{_way(config)}, in memory: {describe_setting(config)}.",
        "",
        f"Calibration data: {len(tokens)} samples of {tokens.shape[1]} token ids (sha256 `{digest}` of "
        "their int64 values).",
        "",
        _listing("Settings", _settings(config)),
        "",
        _listing("Libraries", {name: version(name) for name in names}),
        "",
    ]
    return "\n".join(lines)


def _way(config: SliderConfig) -> str:
    """Return the method in words."""
    windows = "[SliderQuant](https://arxiv.org/abs/2603.25284) windows"
    return {
        "compensated": "Compensated rounding",
        "combined": f"Compensated rounding and {windows} that trained its scales",
        "slider": windows,
    }[config.method]


def _settings(config: SliderConfig) -> dict[str, Any]:
    """Return the settings that the method has; of parameters trained elsewhere only the format."""
    elsewhere = isinstance(config, QuantizeConfig) and config.parameters is not None
    unknown = set(FOREIGN_SETTINGS[config.method])
    if elsewhere:
        unknown |= {*TRAINING_SETTINGS, "seed"}
    names = [field.name for field in fields(SliderConfig) if field.name not in unknown]
    settings = {name: getattr(config, name) for name in names}
    patterns = {name: " ".join(settings[name]) or "none" for name in ("bits_for", "ignore")}
    return settings | patterns


def _listing(title: str, values: Mapping[str, Any]) -> str:
    return (
        f"{title}: "
        + ", ".join(f"{name} {_literal(str(value))}" for name, value in values.items())
        + "."
    )


def _literal(text: str) -> str:
    """Return text that Markdown shows as it is: special tokens look like HTML and emphasis."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", text)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows of a report as a Markdown table of means."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if not names:
        return []
    table = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = (row["metrics"].get(name, {}).get("mean") for name in names)
        written = (f"{cell:.4g}" if isinstance(cell, float) else str(cell or "") for cell in cells)
        table.append(f"| {row['name']} | {' | '.join(written)} |")
    return [*table, ""]


def history_of(directory: str | Path) -> str:
    """Return the section of an existing card, for the card of a converted copy; may be empty.

    Raises:
        InputError: If the card is no UTF-8 text.
    """
    text = _card_text(directory)
    return text[text.index(HISTORY_TITLE) :] if HISTORY_TITLE in text else ""


def _card_text(directory: str | Path) -> str:
    path = Path(directory) / "README.md"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; restore or remove it") from None


def base_model(directory: str | Path) -> str | None:
    """Return the name of the full-precision model that an existing card gives, if it gives one."""
    for line in _card_text(directory).splitlines():
        if line.startswith("base_model: "):
            name = line.removeprefix("base_model: ")
            with suppress(ValueError):  # written by hand, a name needs no quotes
                name = str(json.loads(name))
            return name
    return None


def model_card(directory: str | Path, base: str, history: str) -> str:
    """Return the card of a finished directory.

    Args:
        directory: Holds the weight files and ``config.json``.
        base: Name of the full-precision model.
        history: From ``history_section`` or ``history_of``.
    """
    # What is in the folder.
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    written = config[MARK]["format"]
    size = sizes(directory)

    # Front matter that model hubs read, then a line for each figure.
    lines = [
        "---",
        f"library_name: {'sliderquant' if written == 'native' else 'transformers'}",
        f"base_model: {json.dumps(base)}",
        "tags: [quantized, sliderquant]",
        "---",
        f"# {directory.name}",
        "",
        f"{base}, {_NAMES[written]}.",
        "",
        f"- Weight files: {size['directory'] / 1e6:.1f} MB",
    ]
    if "linears" in size:
        ratio = size["bfloat16"] / size["linears"]
        bits = 16 / ratio
        lines += [
            f"- Quantized layers: {size['linears'] / 1e6:.1f} MB, {bits:.3f} bits per weight with "
            f"scales, 1/{ratio:.2f} of 16-bit; everything else is in {config['dtype']}"
        ]
    return "\n".join([*lines, "", "## How to load it", "", _loading(config, written), history])


def gguf_card(directory: str | Path, base: str, cost: str, history: str) -> str:
    """Return the card of a folder with a file for llama.cpp.

    Args:
        directory: Holds the file.
        base: Name of the full-precision model.
        cost: What the file's float16 scales changed, in a line.
        history: From ``history_of``.
    """
    size = (Path(directory) / FILE_NAME).stat().st_size
    lines = [
        "---",
        "library_name: gguf",
        f"base_model: {json.dumps(base)}",
        "tags: [quantized, sliderquant, gguf]",
        "---",
        f"# {Path(directory).name}",
        "",
        f"{base}, quantized, for llama.cpp. Against the folder it was made of: {cost}.",
        "",
        f"- {FILE_NAME}: {size / 1e6:.1f} MB",
        "",
        "## How to load it",
        "",
        f"```\nllama-server -m PATH_OF_THIS_FOLDER/{FILE_NAME}\n```\n",
        history,
    ]
    return "\n".join(lines)


_NAMES = {
    "compressed-tensors": "quantized and packed (compressed-tensors)",
    "native": "quantized and packed (sliderquant's own format)",
    "dense": "quantized, stored dequantized",
    "gptq": "quantized and packed (in the layout of GPTQ checkpoints)",
    "pre-quant": "calibrated for quantization but not rounded: let another quantizer finish it",
}


def _loading(config: Mapping[str, Any], written: str) -> str:
    """Return how to load the folder, and how to serve it."""
    if written == "native":
        return (
            "Needs `pip install sliderquant`; other loaders refuse this folder.\n\n"
            "```python\nimport sliderquant\n\n"
            'model = sliderquant.load("PATH_OF_THIS_FOLDER")\n```\n'
        )

    # transformers reads the other formats.
    needed = {"compressed-tensors": "compressed-tensors", "gptq": "gptqmodel"}.get(written)
    extra = f"Needs `pip install {needed}`.\n\n" if needed else ""
    lines = (
        f"{extra}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n```\n'
    )
    if written == "pre-quant":
        return lines

    # What is rounded can be served.
    serving = (
        "\nServing (not run by the makers of this folder; check the release notes of vLLM):\n\n"
    )
    return f"{lines}{serving}```\nvllm serve PATH_OF_THIS_FOLDER\n```\n{_vllm_remark(config)}"


def _vllm_remark(config: Mapping[str, Any]) -> str:
    """Return what vLLM does not read of the folder, and what it reads instead; may be empty."""
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") == "gptq" and not quantization["sym"]:
        return (
            "\nvLLM 0.32 refused this asymmetric layout, tried on a CPU: export the native folder with "
            "`--format compressed-tensors` for it.\n"
        )

    # Bits without a kernel fit into containers that have one.
    bits = {
        group["weights"]["num_bits"] for group in quantization.get("config_groups", {}).values()
    }
    if min(bits, default=4) < 4:
        return (
            "\nvLLM 0.32 refused weights in fewer than 4 bits, tried on a CPU: for it give "
            "`--container-bits 4` to `quantize`, or to `export` of the native folder.\n"
        )
    if not bits <= {4, 8}:
        return "\nvLLM was tried with weights of 4 and 8 bits alone, not with these.\n"
    return ""
