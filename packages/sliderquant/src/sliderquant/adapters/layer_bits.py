"""Which layer is stored in how many bits: patterns of the settings against the names of a model.

A layer is called by its name in the model without ``model.`` and ``.weight``, such as
``layers.0.mlp.down_proj``. A pattern is a shell pattern that fits the whole name, or its end behind any
dot; ``*`` reaches over dots. Of several ``bits_for`` that fit, the last one counts; ``ignore`` wins over
all of them, and is the same as 16 bits.
"""

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import AutoConfig

from effml_common.errors import ConfigError
from effml_common.logging import warn
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.streaming import empty_model
from sliderquant.config import FULL_BITS, SliderConfig
from sliderquant.method.layout import WEIGHT_SUFFIX, LayerGroup, layer_groups, layer_name
from sliderquant.method.quantizer import BYTE_BITS, WeightFormat
from sliderquant.method_config import split_bits

NEVER_ROUNDED = ("lm_head", "embed_tokens")
NEAREST_NAMES = 3
FLOAT16_DIGITS = 11  # binary digits of a float16 number

BlockBits = dict[str, int]  # bits of each linear weight of a block by parameter name
BlockFormats = dict[str, WeightFormat]


def fits(pattern: str, name: str) -> bool:
    """Return whether a pattern fits a layer's name, or its end behind any dot.

    >>> fits("layers.0.*", "layers.0.mlp.down_proj"), fits("down_proj", "layers.0.mlp.down_proj")
    (True, True)
    >>> fits("layers.1.*", "layers.11.mlp.down_proj")
    False
    """
    pattern = pattern.removeprefix("model.").removesuffix(WEIGHT_SUFFIX)
    words = name.split(".")
    return any(fnmatchcase(".".join(words[start:]), pattern) for start in range(len(words)))


def layer_bits(config: SliderConfig, blocks: Sequence[Iterable[str]]) -> list[BlockBits]:
    """Return the bits of every linear weight, block by block.

    Args:
        config: Bits of all layers, and of those that differ.
        blocks: Names of the linear weights of each block.

    Raises:
        ConfigError: If a pattern fits no layer, or what is asked for cannot be done.
    """
    bits = [dict.fromkeys(names, config.wbits) for names in blocks]
    names = [
        layer_name(block, weight) for block, of_block in enumerate(bits) for weight in of_block
    ]
    changes = [("bits_for", *split_bits(entry)) for entry in config.bits_for]
    changes += [("ignore", pattern, FULL_BITS) for pattern in config.ignore]
    for setting, pattern, changed in changes:
        _check_pattern(setting, pattern, names)
        for block, of_block in enumerate(bits):
            of_block.update(
                {weight: changed for weight in of_block if fits(pattern, layer_name(block, weight))}
            )

    # Fused experts round their inputs themselves, all of them.
    exact = {weight for of_block in bits for weight, b in of_block.items() if b == FULL_BITS}
    experts = sorted(weight for weight in exact if not weight.endswith(WEIGHT_SUFFIX))
    if config.has_mixed_bits and experts and config.abits != FULL_BITS:
        raise ConfigError(
            f"{', '.join(experts)}: experts whose weights are left out cannot read exact activations; "
            "give them bits, or set abits to 16"
        )
    return bits


def _check_pattern(setting: str, pattern: str, names: Sequence[str]) -> None:
    """Refuse a pattern that fits none of the names."""
    if any(fits(pattern, name) for name in names):
        return
    for name in NEVER_ROUNDED:
        if fits(pattern, name):
            raise ConfigError(
                f"{setting} has {pattern!r}, and {name} is never rounded; leave it out"
            )

    # Whole names, their ends, and patterns of whole blocks.
    known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    known |= dict.fromkeys(name.split(".", 2)[-1] for name in names)
    known |= dict.fromkeys(".".join([*name.split(".")[:2], "*"]) for name in names)
    known |= dict.fromkeys(names)
    near = difflib.get_close_matches(pattern, known, n=NEAREST_NAMES) or list(known)[:NEAREST_NAMES]
    raise ConfigError(
        f"{setting} has {pattern!r}, which fits no layer; use names such as {', '.join(near)}"
    )


def weight_format(
    config: SliderConfig, dtype: torch.dtype, bits: int | None = None
) -> WeightFormat:
    """Return the storage format that ``config`` asks for, in a model whose weights have ``dtype``.

    Args:
        config: Grid and group size, and whom the codes are for.
        dtype: Of the model's weights.
        bits: Of the layer; default those of most layers.
    """
    # llama.cpp multiplies float16 scales and, in asymmetric blocks, adds a float16 minimum z D.
    bits, for_gguf = config.wbits if bits is None else bits, config.for_ == "gguf"
    digits = FLOAT16_DIGITS - (0 if config.sym else bits)
    return WeightFormat(
        bits=bits,
        group_size=config.columns_per_scale,
        sym=config.sym,
        dtype=torch.float32 if for_gguf else dtype,
        float16_digits=digits if for_gguf and bits != FULL_BITS else None,
    )


def block_formats(config: SliderConfig, bits: BlockBits, dtype: torch.dtype) -> BlockFormats:
    """Return the storage formats of a block's linear weights; layers left out have 16 bits.

    Args:
        config: Grid and group size, and whom the codes are for.
        bits: Of the block's weights.
        dtype: Of the model's weights.
    """
    formats = {name: weight_format(config, dtype, of_weight) for name, of_weight in bits.items()}
    return {
        name: replace(fmt, group_size=None) if fmt.bits == FULL_BITS else fmt
        for name, fmt in formats.items()
    }


def mean_bits_per_weight(
    blocks: Sequence[Mapping[str, Sequence[int]]],
    formats: Sequence[Mapping[str, WeightFormat]],
    dtype: torch.dtype,
) -> float:
    """Return the stored bits per linear weight over all blocks, scales and zero points included.

    Args:
        blocks: Shape of every linear weight, by name, for each block.
        formats: Storage formats; weights without one, or in 16 bits, are stored in ``dtype``.
        dtype: Of the checkpoint.
    """
    stored = weights = 0.0
    for shapes, of_block in zip(blocks, formats, strict=True):
        for name, shape in shapes.items():
            fmt = of_block.get(name)
            if fmt is None or fmt.bits == FULL_BITS:
                bits = BYTE_BITS * dtype.itemsize
            else:
                bits = fmt.bits_per_weight(shape[-1])
            stored += math.prod(shape) * bits
            weights += math.prod(shape)
    return stored / weights


def describe_bits(blocks: Sequence[BlockBits]) -> str:
    """Return in one line how many layers have how many bits, and which differ from most.

    >>> describe_bits([{"a.weight": 8, "b.weight": 8}, {"a.weight": 4, "b.weight": 4}, {"a.weight": 4}])
    '3 layers in 4 bits; 2 in 8 bits (layers.0.*)'
    """
    counts = Counter(bits for of_block in blocks for bits in of_block.values())
    (usual, _), *_ = counts.most_common()
    parts = []
    for bits, count in sorted(counts.items(), key=lambda item: (item[0] != usual, item[0])):
        layers = " layer" if count == 1 else " layers"
        what = "not rounded" if bits == FULL_BITS else f"in {bits} bits"
        where = "" if bits == usual else f" ({', '.join(_places(blocks, bits))})"
        parts.append(f"{count}{'' if parts else layers} {what}{where}")
    return "; ".join(parts)


def _places(blocks: Sequence[BlockBits], bits: int) -> list[str]:
    """Return what has these bits: whole blocks, then single layers by their place in a block."""
    whole = [block for block, of_block in enumerate(blocks) if set(of_block.values()) == {bits}]
    places: dict[str, list[int]] = defaultdict(list)
    for block, of_block in enumerate(blocks):
        for name in () if block in whole else of_block:
            if of_block[name] == bits:
                places[name.removesuffix(WEIGHT_SUFFIX)].append(block)
    texts = [f"layers.{_ranges(whole)}.*"] if whole else []
    return texts + [f"layers.{_ranges(numbers)}.{place}" for place, numbers in places.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers as text such as "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def check_servable_folder(config: Mapping[str, Any], formats: Mapping[str, WeightFormat]) -> None:
    """Warn where layers of a folder that servers fuse differ.

    Args:
        config: ``config.json`` of the model in full precision.
        formats: Of the quantized weights, by their full names.
    """
    decoder = TransformersDecoder(empty_model(AutoConfig.for_model(**config)))
    layouts = [decoder.layout(block) for block in range(decoder.depth)]
    bits: list[BlockBits] = []
    for block, layout in enumerate(layouts):
        found = {name: formats.get(f"model.layers.{block}.{name}") for name in layout.linears}
        bits.append({name: fmt.bits if fmt else FULL_BITS for name, fmt in found.items()})
    check_servable(bits, [layer_groups(layout) for layout in layouts])


def check_servable(blocks: Sequence[BlockBits], groups: Sequence[Sequence[LayerGroup]]) -> None:
    """Warn where layers that servers fuse differ.

    Args:
        blocks: Bits of every weight of each block, to be written as compressed-tensors.
        groups: Linear layers that read the same input, of each block.
    """
    # vLLM multiplies with q, k and v at once, and with gate and up.
    differing: dict[Collection[str], list[int]] = defaultdict(list)
    for block, (of_block, of_groups) in enumerate(zip(blocks, groups, strict=True)):
        for group in of_groups:
            if len({of_block[name] for name in group.weights}) > 1:
                differing[group.weights].append(block)
    if differing:
        named = "; ".join(
            f"{', '.join(name.removesuffix(WEIGHT_SUFFIX) for name in weights)} of layers "
            f"{_ranges(numbers)}"
            for weights, numbers in differing.items()
        )
        warn(
            f"layers that read the same input differ in their bits: {named}; transformers loads "
            "that, vLLM needs one format for layers that it fuses"
        )
