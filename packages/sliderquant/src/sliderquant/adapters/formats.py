"""The formats a quantized model is written in: what each can express, and what ``config.json`` says.

What transformers can load of compressed-tensors was found by loading (docs/formats.md).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from effml_common.errors import ConfigError
from effml_common.logging import warn
from sliderquant.adapters.families import DOWN_EXPERTS, GATE_UP_EXPERTS
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.quantizer import WeightFormat

ExportFormat = Literal["compressed-tensors", "native", "dense", "pre-quant", "gguf", "gptq"]
MARK = "sliderquant"  # key of config.json that says what was done
NATIVE_TYPE = "sliderquant-native"  # a model type that transformers does not know
NATIVE_VERSION = 1
# The release of compressed-tensors whose layout is written; 3, 5, 6 and 7 bits differ before it.
LAYOUT_VERSION = "0.20.0"
CONTAINER_BITS = (4, 8)
PACK_QUANTIZED, INT_QUANTIZED, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def check_expressible(
    format: ExportFormat,  # noqa: A002 - the word of the command line
    weights: Mapping[str, WeightFormat],
    activations: ActivationFormat | None,
    plain: Iterable[str] = (),
) -> None:
    """Refuse what nobody could load, and warn about what is lost, before any work is done.

    Args:
        format: Of the export.
        weights: Formats of the quantized parameters, by their full names.
        activations: Rounding of activations.
        plain: Parameters that are not quantized, by their full names.

    Raises:
        ConfigError: Naming what can be done instead.
    """
    # Formats of this package express everything; dense ones lose the rounding of activations.
    experts = {name for name in weights if name.endswith((GATE_UP_EXPERTS, DOWN_EXPERTS))}
    # So does compressed-tensors without a quantized weight, which is a model as any other.
    weights_only = format in ("dense", "pre-quant", "gguf", "gptq")
    weights_only |= format == "compressed-tensors" and not weights
    if weights_only and activations is not None:
        warn(f"format {format} holds weights only: loaded again, no activation is rounded")
    if format != "compressed-tensors":
        return
    if any(fmt.float16_digits for fmt in weights.values()):
        raise ConfigError(
            "compressed-tensors has no float16 scales beside weights of another type; use "
            "--format native, and export that with --format gguf"
        )
    left_out = [name for name in plain if name.endswith((GATE_UP_EXPERTS, DOWN_EXPERTS))]
    if weights and left_out:
        raise ConfigError(
            "transformers takes all experts of compressed-tensors for packed, and "
            f"{left_out[0]} is not; give experts bits, or use --format native"
        )
    if activations is not None:
        _check_activations(activations, bool(experts))

    # What transformers cannot load of compressed-tensors.
    kinds = {_kind(fmt) for fmt in weights.values()}
    asymmetric = any(not fmt.sym for fmt in weights.values())
    if asymmetric and experts:
        raise ConfigError(
            "transformers cannot load asymmetric experts from compressed-tensors; calibrate with "
            "--sym, or use --format native"
        )
    if asymmetric and len(kinds) > 1:
        raise ConfigError(
            "transformers cannot load asymmetric compressed-tensors weights of several kinds; "
            "use one kind, --sym, or --format native"
        )
    if asymmetric and activations is not None:
        raise ConfigError(
            "transformers drops the rounding of activations when it loads asymmetric weights; "
            "calibrate with --sym, or use --format native"
        )
    if len({_kind(weights[name]) for name in experts}) > 1:
        raise ConfigError(
            "transformers reads all experts in one format; give them the same bits and group size, "
            "or use --format native"
        )


def written_dtype(
    format: ExportFormat,  # noqa: A002 - the word of the command line
    formats: Iterable[WeightFormat],
    dtype: torch.dtype,
) -> torch.dtype:
    """Return the type of what a folder holds besides codes, such that no weight is rounded again.

    Args:
        format: Of the folder.
        formats: Of the quantized weights.
        dtype: Of the checkpoint; products with float16 scales need float32 where they are dense.
    """
    is_wider = format == "dense" and any(fmt.float16_digits for fmt in formats)
    return torch.float32 if is_wider else dtype


def _check_activations(activations: ActivationFormat, moe: bool) -> None:
    if activations.attention:
        raise ConfigError(
            "compressed-tensors has no rounding of queries, keys and values; calibrate with "
            "--no-quantize-attention, or use --format native"
        )
    if not activations.sym:
        raise ConfigError(
            "asymmetric activations are rounded otherwise by compressed-tensors and by no server; "
            "calibrate with --act-sym, or use --format native"
        )
    if moe:
        raise ConfigError(
            "transformers does not round the activations of experts; use --abits 16, or --format native"
        )


def packing_of(fmt: WeightFormat, activations: ActivationFormat | None) -> str:
    """Return how compressed-tensors stores codes: one per byte, or packed into words.

    Servers multiply 8-bit weights with 8-bit activations as they are, with one scale per row. Packed
    codes mean to them that activations are not rounded.
    """
    both_eight = fmt.bits == 8 and activations is not None and activations.bits == 8
    return INT_QUANTIZED if both_eight and fmt.group_size is None and fmt.sym else PACK_QUANTIZED


def _kind(fmt: WeightFormat) -> tuple[int, int | None, bool]:
    return fmt.bits, fmt.group_size, fmt.sym


def describe(fmt: WeightFormat) -> dict[str, Any]:
    """Return a weight format as JSON; the dtype is that of the model unless scales are in float16."""
    described = {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.sym}
    return described | ({"float16_digits": fmt.float16_digits} if fmt.float16_digits else {})


def described_format(entry: Mapping[str, Any], dtype: torch.dtype) -> WeightFormat:
    """Return the weight format that ``describe`` described, in a model of a dtype.

    Raises:
        KeyError, TypeError, ValueError: If it is none.
    """
    bits, group_size, digits = entry["bits"], entry["group_size"], entry.get("float16_digits")
    if bits not in range(2, 9) or not (group_size is None or 0 < group_size < 2**31):
        raise ValueError(f"{bits} bits in groups of {group_size}")
    if digits not in (None, *range(1, 12)):
        raise ValueError(f"scales with {digits} binary digits")
    return WeightFormat(
        bits=bits,
        group_size=group_size,
        sym=bool(entry["sym"]),
        dtype=dtype if digits is None else torch.float32,
        float16_digits=digits,
    )


def describe_activations(activations: ActivationFormat | None) -> dict[str, Any] | None:
    """Return a format of activations as JSON."""
    if activations is None:
        return None
    return {
        "bits": activations.bits,
        "sym": activations.sym,
        "attention": activations.attention,
        # Absent where there are none, as in models of earlier versions.
        **({"exact_inputs": exact} if (exact := sorted(activations.exact_inputs)) else {}),
    }


def native_config(
    config: Mapping[str, Any],
    weights: Mapping[str, WeightFormat],
    activations: ActivationFormat | None,
) -> dict[str, Any]:
    """Return a ``config.json`` that only this package reads.

    Elsewhere its model type is an error. An unknown quantization method alone would be a warning, and
    the weights random.
    """
    return {
        **config,
        "model_type": NATIVE_TYPE,
        "base_model_type": config["model_type"],
        "quantization_config": {
            "quant_method": "sliderquant",
            "sliderquant_version": NATIVE_VERSION,
            "weights": {name: describe(fmt) for name, fmt in weights.items()},
            "activations": describe_activations(activations),
        },
    }


def compressed_tensors_config(
    weights: Mapping[str, WeightFormat],
    plain: Sequence[str],
    activations: ActivationFormat | None,
    moe: bool,
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model in the layout of compressed-tensors.

    Args:
        weights: Formats of the quantized parameters, by their full names.
        plain: Linear weights that stay as they are.
        activations: Rounding of activations, symmetric per token.
        moe: Whether there are routers, which stay as they are.
    """
    # Weights of one format share a group of the config.
    kinds: dict[tuple[int, int | None, bool], list[str]] = defaultdict(list)
    packing: dict[tuple[int, int | None, bool], str] = {}
    for name, fmt in weights.items():
        kinds[_kind(fmt)].append(name)
        packing[_kind(fmt)] = packing_of(fmt, activations)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(kinds) == 1 else layer_patterns(names),
            "format": packing[bits, group_size, sym],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": sym,
                "strategy": "group" if group_size else "channel",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None if activations is None else _token_args(activations),
            "output_activations": None,
        }
        for number, ((bits, group_size, sym), names) in enumerate(kinds.items())
    }

    # Head, routers and unrounded layers are named, because "Linear" means every linear layer.
    quantization = {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": MIXED if len(set(packing.values())) > 1 else next(iter(packing.values())),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *([r"re:.*\.gate$"] if moe else []), *layer_patterns(plain)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if any(not fmt.sym for fmt in weights.values()):
        # Read by transformers: its other way of loading fails on zero points.
        quantization["dequantize"] = True
    return quantization


def _token_args(activations: ActivationFormat) -> dict[str, Any]:
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.sym,
        "strategy": "token",
        "dynamic": True,
    }


def layer_patterns(names: Iterable[str]) -> list[str]:
    """Return regular expressions that match exactly these layers, one per place in the block.

    Args:
        names: Parameters of decoder blocks, by their full names.
    """
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = LAYER.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no layer of a decoder block")
        place = re.escape(match[2].removesuffix(".weight"))
        if match[2] in (GATE_UP_EXPERTS, DOWN_EXPERTS):  # one layer per expert in the files
            place = r"(mlp|block_sparse_moe)\.experts.*"
        if match[1] not in blocks[place]:
            blocks[place].append(match[1])
    return [rf"re:.*layers\.({'|'.join(numbers)})\.{place}$" for place, numbers in blocks.items()]
