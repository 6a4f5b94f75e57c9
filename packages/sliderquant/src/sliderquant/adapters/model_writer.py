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
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from effml_common.files import atomic_write
from sliderquant.adapters.families import (
    DOWN_EXPERTS,
    GATE_UP_EXPERTS,
    ROUTER,
    block_layout,
    family_of,
)
from sliderquant.adapters.files import COMPANION_FILES, quiet_transformers
from sliderquant.adapters.formats import (
    INT_QUANTIZED,
    LAYER,
    MARK,
    ExportFormat,
    compressed_tensors_config,
    describe,
    described_format,
    native_config,
    packing_of,
)
from sliderquant.adapters.gptq_layout import gptq_config, gptq_tensors
from sliderquant.adapters.shards import SHARD_BYTES, ShardWriter
from sliderquant.adapters.streaming import HEAD, empty_model
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.packing import SCALE, packed_tensors
from sliderquant.method.quantizer import QuantizedWeight, WeightFormat


class ModelWriter:
    """Writes one model directory.

    Args:
        out: Folder to write; its files appear under their final names only when they are complete.
        source: Directory whose config, tokenizer, chat template and generation config are taken over.
        format: "compressed-tensors" (packed, loads in transformers and vLLM), "native" (packed, loads
            with ``sliderquant.load``), "dense" (dequantized), "pre-quant" (not rounded at all).
        dtype: Type of all weights that are not integers.
        config: What to write as ``config.json``; default that of the source.
        config_changes: Keys of ``config.json`` that differ from the source's, for example
            ``{"tie_word_embeddings": False}`` after a rotation.
        activations: Rounding of activations that belongs to the model, if any.
        container_bits: Store every code in this many bits; the values stay the same.
        identity: Of the run (such as its fingerprint): an interrupted export is continued only under
            the same.

    Raises:
        InputError: If ``out`` holds a model, or an unfinished export with another identity.
    """

    def __init__(
        self,
        out: str | Path,
        source: str | Path,
        *,
        format: ExportFormat,  # noqa: A002 - the word of the command line
        dtype: torch.dtype,
        config: Mapping[str, Any] | None = None,
        config_changes: Mapping[str, Any] | None = None,
        activations: ActivationFormat | None = None,
        container_bits: int | None = None,
        identity: str = "",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out, self.source = Path(out), Path(source)
        self.format, self.dtype, self.activations = format, dtype, activations
        self._container_bits = container_bits

        # The config of the source, with what differs in the result.
        original = config or json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        self._config = {**original, **(config_changes or {})}
        self._family = family_of(self._config["model_type"])
        # Asked of the config class: a file may leave out what is the family's default.
        self._tied = AutoConfig.for_model(**self._config).tie_word_embeddings

        # An unfinished export is continued only if it is of the same run and format.
        stem = "sliderquant" if format == "native" else "model"
        run = {"format": format, "dtype": str(dtype), "container": container_bits, "run": identity}
        self._shards = ShardWriter(self.out, stem, run, shard_bytes)

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
        if self._tied:
            new.pop(HEAD, None)
        if not new:
            return

        # What the files hold of each parameter, and the format that the config will name.
        stored: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any] | None] = {}
        for name, value in new.items():
            if isinstance(value, QuantizedWeight) and self.format != "dense":
                value = self._in_container(value)
            notes[name] = describe(value.fmt) if isinstance(value, QuantizedWeight) else None
            for disk_name, part in self._parts(name, value):
                stored |= self._stored(disk_name, part)
        self._shards.add(stored, notes)

    def _in_container(self, value: QuantizedWeight) -> QuantizedWeight:
        """Return the same integers in a wider field."""
        if self._container_bits is None or self._container_bits <= value.fmt.bits:
            return value
        return replace(value, fmt=replace(value.fmt, bits=self._container_bits))

    def _parts(
        self, name: str, value: QuantizedWeight | Tensor
    ) -> Iterable[tuple[str, QuantizedWeight | Tensor]]:
        """Yield a parameter under its checkpoint name, or its experts one by one under theirs."""
        # Only experts are stored under other names than they have in the model.
        match = LAYER.fullmatch(name)
        files = self._family.expert_files
        if match is None or files is None or self.format == "native":
            yield name, value
            return

        # Gate and up projection of an expert are fused in the model, and apart in the files.
        prefix, inner = f"model.layers.{match[1]}.", match[2]
        gate, up, down, router = files
        if inner == ROUTER:
            yield prefix + router, value
        elif inner in (GATE_UP_EXPERTS, DOWN_EXPERTS):
            codes = value.codes if isinstance(value, QuantizedWeight) else value
            for expert in range(codes.shape[0]):
                weight, rows = value[expert], codes.shape[1] // 2
                if inner == DOWN_EXPERTS:
                    yield prefix + down.format(expert), weight
                else:
                    yield prefix + gate.format(expert), weight[:rows]
                    yield prefix + up.format(expert), weight[rows:]
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
        if self.format == "gptq":
            return {f"{layer}.{suffix}": t for suffix, t in gptq_tensors(value, layer).items()}
        is_compressed = self.format == "compressed-tensors"
        if is_compressed and packing_of(value.fmt, self.activations) == INT_QUANTIZED:
            return {name: value.codes.to(torch.int8), f"{layer}.{SCALE}": value.scale}
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
        # Checked first: nothing is published while a parameter is missing.
        formats = {
            name: described_format(note, self.dtype)
            for name, note in self._shards.notes.items()
            if note
        }
        config = self._final_config(formats)
        files = self._shards.join()

        # Tokenizer, chat template and generation config come along as they are.
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

        # A folder without its config is no model, so this makes the result visible.
        atomic_write(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        self._shards.finish()
        return [*files, "config.json"]

    def _final_config(self, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
        """Return what ``config.json`` will say, after checking that nothing is missing."""
        # Every parameter of the model, but for a head that is the embedding.
        with quiet_transformers():
            hf_config = AutoConfig.for_model(**self._config)
            model = empty_model(hf_config)
        expected = {name for name, _ in model.named_parameters()}
        if self._tied:
            expected.discard(HEAD)
        if missing := sorted(expected - self.written):
            raise RuntimeError(f"{len(missing)} parameters were not written, such as {missing[0]}")

        # What every format says: its type, and that it comes from here.
        config = {k: v for k, v in self._config.items() if k not in ("torch_dtype", "dtype")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        config[MARK] = {"format": self.format, "rounded": bool(formats)}
        if self.format == "native":  # also without codes: activations may be rounded
            return native_config(config, formats, self.activations)
        if self.format in ("dense", "pre-quant") or not formats:
            return config
        if self.format == "gptq":
            config["quantization_config"] = gptq_config(next(iter(formats.values())))
            return config

        # compressed-tensors names the layers that are not quantized.
        # Blocks may differ: some have experts, others a dense MLP.
        plain = []
        for block, module in enumerate(model.model.layers):
            shapes = {name: p.shape for name, p in module.named_parameters()}
            linears = [f"model.layers.{block}.{n}" for n in block_layout(hf_config, shapes).linears]
            plain += [name for name in linears if name not in formats]
        moe = self._family.expert_files is not None
        config["quantization_config"] = compressed_tensors_config(
            formats, plain, self.activations, moe
        )
        return config
