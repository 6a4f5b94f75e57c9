"""Writing quantized models, one block at a time, in formats that other programs load.

``ModelWriter`` is opened on an empty folder, takes weights as they become final, and publishes at the
end: ``config.json`` appears last, and a folder without it is not taken for a model.

    writer = ModelWriter(out, source, format="compressed-tensors", dtype=torch.bfloat16)
    for block in ...:
        writer.write({"model.layers.0.self_attn.q_proj.weight": quantize_weight(...), ...})
    writer.write({"model.embed_tokens.weight": ..., "model.norm.weight": ..., ...})
    writer.publish(card)
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from effml_common.errors import ConfigError, InputError
from effml_common.files import atomic_write
from effml_common.logging import warn
from sliderquant.activations import ActivationFormat
from sliderquant.adapters.families import (
    DOWN_EXPERTS,
    GATE_UP_EXPERTS,
    ROUTER,
    block_layout,
    family_of,
)
from sliderquant.adapters.files import COMPANION_FILES, quiet_transformers
from sliderquant.adapters.shards import SHARD_BYTES, ShardWriter
from sliderquant.adapters.streaming import empty_model
from sliderquant.packing import packed_tensors
from sliderquant.quantizer import QuantizedWeight, WeightFormat

ExportFormat = Literal["compressed-tensors", "native", "dense", "pre-quant"]
MARK = "sliderquant"  # key of config.json that says what was done
NATIVE_TYPE = "sliderquant-native"  # a model type that transformers does not know
NATIVE_VERSION = 1
# The release of compressed-tensors whose layout is written; 3, 5, 6 and 7 bits differ before it.
LAYOUT_VERSION = "0.20.0"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class ModelWriter:
    """Writes one model directory.

    Args:
        out: Folder to write; its files appear under their final names only when they are whole.
        source: Directory whose config, tokenizer, chat template and generation config are taken over.
        format: "compressed-tensors" (packed, loads in transformers and vLLM), "native" (packed, loads
            with ``sliderquant.load``), "dense" (dequantized), "pre-quant" (not rounded at all).
        dtype: Type of all weights that are not integers.
        config_changes: Keys of ``config.json`` that differ from the source's, for example
            ``{"tie_word_embeddings": False}`` after a rotation.
        activations: Rounding of activations that belongs to the model, if any.
        container_bits: Store every code in this many bits; the values stay the same.
        identity: Of the run (such as its fingerprint): an interrupted export is continued only under
            the same.

    Raises:
        InputError: If ``out`` holds a model, or an unfinished export with another identity.
        ConfigError: If the format cannot express ``activations``.
    """

    def __init__(
        self,
        out: str | Path,
        source: str | Path,
        *,
        format: ExportFormat,  # noqa: A002 - the word of the command line
        dtype: torch.dtype,
        config_changes: Mapping[str, Any] | None = None,
        activations: ActivationFormat | None = None,
        container_bits: int | None = None,
        identity: str = "",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        check_activations(format, activations)
        self.out, self.source = Path(out), Path(source)
        self.format, self.dtype, self.activations = format, dtype, activations
        self._container_bits = container_bits
        self._config = json.loads((self.source / "config.json").read_text()) | dict(
            config_changes or {}
        )
        self._family = family_of(self._config["model_type"])
        stem = "sliderquant" if format == "native" else "model"
        told = {"format": format, "dtype": str(dtype), "container": container_bits, "run": identity}
        self._shards = ShardWriter(self.out, stem, told, shard_bytes)

    @property
    def written(self) -> frozenset[str]:
        """Parameters that are on disk already, also from an earlier, interrupted run."""
        return frozenset(self._shards.notes)

    def write(self, tensors: Mapping[str, QuantizedWeight | Tensor]) -> None:
        """Write parameters; the call returns when they are on disk, whatever was written before stays.

        Args:
            tensors: By their names in the transformers model, fused experts included. Names that are
                in ``written`` are skipped, so that an interrupted run may simply repeat itself.

        Raises:
            OSError: If the disk is full.
        """
        new = {name: value for name, value in tensors.items() if name not in self.written}
        if new.get("lm_head.weight") is not None and self._config.get("tie_word_embeddings"):
            del new["lm_head.weight"]
        if not new:
            return
        stored: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any] | None] = {}
        for name, value in new.items():
            if isinstance(value, QuantizedWeight) and self.format != "dense":
                value = self._contained(value)
            notes[name] = _describe(value.fmt) if isinstance(value, QuantizedWeight) else None
            for disk_name, part in self._parts(name, value):
                stored |= self._stored(disk_name, part)
        self._shards.add(stored, notes)

    def _contained(self, value: QuantizedWeight) -> QuantizedWeight:
        """The same integers in a wider field."""
        if self._container_bits is None or self._container_bits <= value.fmt.bits:
            return value
        return replace(value, fmt=replace(value.fmt, bits=self._container_bits))

    def _parts(
        self, name: str, value: QuantizedWeight | Tensor
    ) -> Iterable[tuple[str, QuantizedWeight | Tensor]]:
        """Yield a parameter under its checkpoint name, or its experts one by one under theirs."""
        match = _LAYER.fullmatch(name)
        files = self._family.expert_files
        if match is None or files is None or self.format == "native":
            yield name, value
            return
        prefix, inner = f"model.layers.{match[1]}.", match[2]
        gate, up, down, router = files
        if inner == ROUTER:
            yield prefix + router, value
        elif inner in (GATE_UP_EXPERTS, DOWN_EXPERTS):
            codes = value.codes if isinstance(value, QuantizedWeight) else value
            for expert in range(codes.shape[0]):
                whole, rows = value[expert], codes.shape[1] // 2
                if inner == DOWN_EXPERTS:
                    yield prefix + down.format(expert), whole
                else:
                    yield prefix + gate.format(expert), whole[:rows]
                    yield prefix + up.format(expert), whole[rows:]
        else:
            yield name, value

    def _stored(self, name: str, value: QuantizedWeight | Tensor) -> dict[str, Tensor]:
        if isinstance(value, Tensor):
            return {name: value.to(self.dtype)}
        if self.format == "pre-quant":
            raise ValueError(f"{name}: pre-quant takes weights that are not rounded")
        if self.format == "dense":
            return {name: value.dequantize().to(self.dtype)}
        layer = name.removesuffix(".weight")
        return {f"{layer}.{suffix}": t for suffix, t in packed_tensors(value).items()}

    def publish(self, card: str | None = None) -> list[str]:
        """Give the files their final names, ``config.json`` last; may be repeated after a kill.

        Args:
            card: Text of the model card, written as ``README.md``.

        Returns:
            Names of all files.

        Raises:
            RuntimeError: If a parameter of the model was never written.
        """
        formats = {
            name: WeightFormat(**(note | {"dtype": self.dtype}))
            for name, note in self._shards.notes.items()
            if note
        }
        config = self._final_config(formats)
        files = self._shards.join()
        for pattern in COMPANION_FILES:
            for path in sorted(self.source.glob(pattern)):
                target = self.out / path.name
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    atomic_write(target, path.read_bytes())
                files.append(path.name)
        if card is not None:
            atomic_write(self.out / "README.md", card)
            files.append("README.md")
        atomic_write(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        self._shards.finish()
        return [*files, "config.json"]

    def _final_config(self, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
        """Return what ``config.json`` will say, after checking that nothing is missing."""
        with quiet_transformers():
            hf_config = AutoConfig.for_model(**self._config)
            model = empty_model(hf_config)
        parameters = dict(model.named_parameters())
        if missing := sorted(parameters.keys() - self.written):
            raise RuntimeError(f"{len(missing)} parameters were not written, such as {missing[0]}")
        config = {k: v for k, v in self._config.items() if k not in ("torch_dtype", "dtype")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        config[MARK] = {"format": self.format, "rounded": bool(formats)}
        if self.format in ("dense", "pre-quant") or not formats:
            return config
        if self.format == "native":
            return _native_config(config, formats, self.activations)
        shapes = {name: p.shape for name, p in model.model.layers[0].named_parameters()}
        linears = block_layout(hf_config, shapes).linears
        plain = [
            f"model.layers.{block}.{name}"
            for block in range(len(model.model.layers))
            for name in linears
            if f"model.layers.{block}.{name}" not in formats
        ]
        moe = self._family.expert_files is not None
        config["quantization_config"] = compressed_tensors_config(
            formats, plain, self.activations, moe
        )
        return config


def _describe(fmt: WeightFormat) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.sym}


def _native_config(
    config: dict[str, Any],
    formats: Mapping[str, WeightFormat],
    activations: ActivationFormat | None,
) -> dict[str, Any]:
    """A config that only this package reads: elsewhere its model type is an error, not a warning."""
    rounding = None
    if activations is not None:
        rounding = {
            "bits": activations.bits,
            "sym": activations.sym,
            "attention": activations.attention,
        }
    return config | {
        "model_type": NATIVE_TYPE,
        "base_model_type": config["model_type"],
        "quantization_config": {
            "quant_method": "sliderquant",
            "sliderquant_version": NATIVE_VERSION,
            "weights": {name: _describe(fmt) for name, fmt in formats.items()},
            "activations": rounding,
        },
    }


def compressed_tensors_config(
    formats: Mapping[str, WeightFormat],
    plain: Sequence[str],
    activations: ActivationFormat | None,
    moe: bool,
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a pack-quantized model.

    Args:
        formats: Of every quantized parameter.
        plain: Linear weights that stay as they are.
        activations: Rounding of activations, symmetric per token.
        moe: Whether there are routers, which stay as they are.
    """
    kinds: dict[tuple[int, int | None, bool], list[str]] = defaultdict(list)
    for name, fmt in formats.items():
        kinds[fmt.bits, fmt.group_size, fmt.sym].append(name)
    groups = {}
    for number, ((bits, group_size, sym), names) in enumerate(kinds.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else _patterns(names),
            "format": "pack-quantized",
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": sym,
                "strategy": "group" if group_size else "channel",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None if activations is None else _activation_args(activations),
            "output_activations": None,
        }
    ignored = ["lm_head", *([r"re:.*\.gate$"] if moe else []), *_patterns(plain)]
    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _activation_args(activations: ActivationFormat) -> dict[str, Any]:
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.sym,
        "strategy": "token",
        "dynamic": True,
    }


def _patterns(names: Sequence[str]) -> list[str]:
    """Return regular expressions that match exactly these layers, one per place in the block."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no layer of a decoder block")
        blocks[match[2].removesuffix(".weight")].append(match[1])
    patterns = []
    for inner, numbers in blocks.items():
        place = re.escape(inner)
        if inner in (GATE_UP_EXPERTS, DOWN_EXPERTS):  # one layer per expert in the files
            place = r"mlp\.experts\..*"
        patterns.append(rf"re:.*layers\.({'|'.join(numbers)})\.{place}$")
    return patterns


def check_activations(format: ExportFormat, activations: ActivationFormat | None) -> None:  # noqa: A002
    """Refuse rounding of activations that a format cannot say.

    Raises:
        ConfigError: Naming what can be done instead.
    """
    if activations is None or format == "native":
        return
    if format == "compressed-tensors" and activations.attention:
        raise ConfigError(
            "compressed-tensors has no rounding of queries, keys and values; calibrate with "
            "--no-quantize-attention, or export native"
        )
    if format != "compressed-tensors":
        warn(
            f"format {format} stores weights only: activations will not be rounded when it is loaded"
        )


def check_weights(
    format: ExportFormat,  # noqa: A002
    formats: Iterable[WeightFormat],
    moe: bool,
    container_bits: int | None = None,
) -> None:
    """Refuse or warn about weight formats before any work is done.

    Raises:
        ConfigError: If no program could load the result.
    """
    if format != "compressed-tensors":
        return
    for fmt in formats:
        if not fmt.sym and moe:
            raise ConfigError(
                "transformers loads no asymmetric compressed-tensors experts; use --sym, or --format "
                "native"
            )
        if not fmt.sym:
            warn(
                "asymmetric: transformers loads this only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True)"
            )


def refuse_quantized(directory: Path, raw: Mapping[str, Any]) -> None:
    """Refuse to quantize a model a second time, whatever format it is in.

    Raises:
        InputError: If its config says that weights were rounded.
    """
    if "quantization_config" in raw or (raw.get(MARK) or {}).get("rounded"):
        raise InputError(
            f"{directory} is quantized already; quantize the full-precision model instead"
        )
