"""Quantize a model that is in memory, on token ids: ``quantize`` without a folder."""

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import Progress, say, warn
from effml_common.parsing import require
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.formats import LAYER, MARK, check_expressible, written_dtype
from sliderquant.adapters.layer_bits import check_servable_folder
from sliderquant.adapters.model_in_memory import open_in_memory, stored_config, token_samples
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.rounding import ActivationRounding
from sliderquant.adapters.shapes import decoder_shape
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM
from sliderquant.adapters.text import SCARCE_TOKENS
from sliderquant.commands._estimates import announce
from sliderquant.commands._job import CalibrationJob
from sliderquant.commands._model_card import history_in_memory, model_card
from sliderquant.commands._run_listener import CalibrationListener, WindowClock
from sliderquant.commands.inspect import make_plan
from sliderquant.config import SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.calibration import calibrate, rounding_of_inputs
from sliderquant.method.packing import PackedCodes
from sliderquant.method.quantizer import QuantizedWeight

# The parameters of a block as they are stored, by name inside the block.
StoredBlock = dict[str, PackedCodes | Tensor]
SAVED_FORMATS = ("compressed-tensors", "native", "dense")


class QuantizedModel:
    """A model in memory whose weights are quantized; made by ``quantize_model``.

    Attributes:
        model: The model that was given. Its parameters hold the dequantized values, in their own types;
            if activations belong to what was calibrated, it rounds them, as ``sliderquant.load`` does.
        config: Settings, with ``nsamples`` and ``seqlen`` of the tokens.
        rounding: The rounding of activations inside ``model``; ``rounding.remove()`` takes it out.
            ``None`` if there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: SliderConfig,
        blocks: Sequence[StoredBlock],
        dtype: torch.dtype,
        original: Mapping[str, Any],
        history: str,
        activations: ActivationFormat | None,
    ) -> None:
        self.model, self.config = model, config
        self._blocks, self._dtype, self._original = blocks, dtype, original
        self._history, self._identity = history, secrets.token_hex()
        self._activations = activations

        self.rounding: ActivationRounding | None = None
        if self._activations is not None:
            self.rounding = ActivationRounding(model.model.layers, model.config, self._activations)

    def save(
        self,
        out: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        format: Literal["compressed-tensors", "native", "dense"] = "compressed-tensors",  # noqa: A002
        container_bits: int | None = None,
    ) -> Path:
        """Write a model folder, as ``sliderquant quantize`` does; may be called for several formats.

        Embedding, final norm and head are those of ``model`` now, all else is as it was quantized.

        Args:
            out: Folder to write; must hold no model.
            tokenizer: To store beside the model; without it the folder has none.
            format: As for ``sliderquant quantize --format``.
            container_bits: Store the codes in this many bits, 4 or 8, for servers that read no fewer.

        Returns:
            The folder.

        Raises:
            ConfigError: If the format cannot express the model; say another one.
            InputError: If ``out`` holds a model.
        """
        # Refuse what nobody could load.
        exported = "; gguf and gptq come from a native folder, with sliderquant export"
        remedy = f"use {', '.join(SAVED_FORMATS)}{exported if format in ('gguf', 'gptq') else ''}"
        require(format in SAVED_FORMATS, f"format is {format}", remedy)
        require(
            container_bits in (None, 4, 8),
            f"container_bits is {container_bits}",
            "give 4, 8 or None",
        )
        named = {
            f"model.layers.{block}.{name}": value
            for block, values in enumerate(self._blocks)
            for name, value in values.items()
        }
        formats = {name: v.fmt for name, v in named.items() if isinstance(v, PackedCodes)}
        plain = [name for name, v in named.items() if not isinstance(v, PackedCodes)]
        check_expressible(format, formats, self._activations, plain)
        if format == "compressed-tensors" and formats:
            check_servable_folder(self._original, formats)

        # What lies beside the weights comes from a folder, as that of a model on disk.
        with tempfile.TemporaryDirectory() as companions:
            if tokenizer is not None:
                tokenizer.save_pretrained(companions)
            if self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(companions)
            writer = ModelWriter(
                out,
                companions,
                format=format,
                dtype=written_dtype(format, formats.values(), self._dtype),
                config=self._original,
                activations=self._activations,
                container_bits=container_bits,
                identity=self._identity,
            )
            self._write(writer, named)

        folder = Path(out)
        base = Path(self._original.get("_name_or_path") or self._original["architectures"][0]).name
        atomic_write(folder / "README.md", model_card(folder, base, self._history))
        say(f"wrote {folder}")
        return folder

    def _write(self, writer: ModelWriter, named: Mapping[str, PackedCodes | Tensor]) -> None:
        """Write all parameters, one block at a time, and publish the folder."""
        for block in range(len(self._blocks)):
            inside = {n: v for n, v in named.items() if LAYER.fullmatch(n)[1] == str(block)}  # pyright: ignore[reportOptionalSubscript]
            writer.write({name: _unpacked(value) for name, value in inside.items()})
        for name in (EMBEDDING, NORM, HEAD):
            writer.write({name: self.model.get_parameter(name).detach()})
        writer.publish()


def quantize_model(
    model: PreTrainedModel, tokens: Int[Tensor, "n t"] | Sequence[Tensor], config: SliderConfig
) -> QuantizedModel:
    """Quantize a model that is in memory, in place, on token ids of your own; needs no disk.

    The linear weights get their dequantized values when all blocks are calibrated: if something fails
    before that, the model is as it was. It computes in float32 on the model's device. The result is that
    of ``sliderquant quantize`` for the same model, samples and settings, bit for bit.

    Args:
        model: A ``*ForCausalLM`` of transformers in full precision, on one device. Keep a copy
            (``copy.deepcopy``) if you need the original.
        tokens: Calibration samples, token ids of one length. Each should begin as the tokenizer begins a
            text (BOS). Compensated rounding holds the last eighth of them out to judge by.
        config: Method and format; ``nsamples`` and ``seqlen`` follow from ``tokens``. Rotations need a
            folder and are refused.

    Returns:
        The model with its codes, ready to be saved.

    Raises:
        InputError: If model, tokens and settings do not fit one another.
        CalibrationDivergedError: If a window diverges at three learning rates.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
        >>> tokens = torch.arange(64).view(4, 16)
        >>> result = quantize_model(llama, tokens, SliderConfig(wbits=2, group_size=None))
        >>> len(result.model.model.layers[0].mlp.up_proj.weight[0].unique()) <= 4
        True
    """
    # Check everything before any work.
    if not isinstance(config, SliderConfig):
        raise InputError(f"config is a {type(config).__name__}; give a sliderquant.SliderConfig")
    require(
        config.rotate == "none",
        f"rotate {config.rotate} turns weights of the whole model",
        "use sliderquant quantize on its folder",
    )
    decoder = open_in_memory(model)
    embedding, context = model.get_parameter(EMBEDDING), model.config.max_position_embeddings
    samples = token_samples(tokens, len(embedding), context)
    config = _with_sizes(config, samples)
    original, dtype = stored_config(model), embedding.dtype

    # Plan, as for a folder.
    shape = decoder_shape(decoder)
    learnables = fresh_learnables(decoder, config, dtype)
    job = CalibrationJob(
        config=config,
        decoder=decoder,
        samples=samples,
        plan=make_plan(config, shape, shape.layers),
        formats=[learned.rounded_formats() for learned in learnables],
        activations=rounding_of_inputs(config, learnables),
        learnables=learnables,
        cache=ActivationCache(None),
    )
    if samples.numel() < SCARCE_TOKENS:
        warn(f"only {samples.numel()} calibration tokens; {SCARCE_TOKENS} or more are better")
    announce(job)

    # Only when every block is final does the model change.
    blocks = _calibrated_blocks(job)
    _replace_parameters_(model, blocks)
    rounded = any(isinstance(value, PackedCodes) for block in blocks for value in block.values())
    setattr(model.config, MARK, {"format": "dense", "rounded": rounded})
    history = history_in_memory(config, samples)
    return QuantizedModel(model, config, blocks, dtype, original, history, job.activations)


def _with_sizes(config: SliderConfig, samples: Int[Tensor, "n t"]) -> SliderConfig:
    """Return the settings with the number and the length of the samples that are there."""
    count, length = samples.shape
    for name, value in (("nsamples", count), ("seqlen", length)):
        given = getattr(config, name)
        if given not in (value, getattr(SliderConfig(), name)):
            raise InputError(f"{name} is {given} and tokens have {value}; leave it out")
    return replace(config, nsamples=count, seqlen=length)


def _calibrated_blocks(job: CalibrationJob) -> list[StoredBlock]:
    """Calibrate; return every block as it is stored, its codes packed in the host's memory."""
    blocks: list[StoredBlock] = []

    def keep(block: int) -> None:
        learnables = job.learnables[block]
        stored = learnables.to_storage(job.decoder.tensors(block))
        blocks.append({name: _packed(value) for name, value in stored.items()})
        learnables.forget_codes()

    with Progress("calibrating", job.plan.steps) as bar:
        listener = CalibrationListener(job, bar, WindowClock(job.plan, 0, job.decoder.device))
        calibrate(
            job.decoder,
            job.samples,
            job.plan.windows,
            job.learnables,
            job.config,
            on_update=listener.on_update,
            on_window=listener.on_window,
            on_block=keep,
            on_experts=listener.on_experts,
            on_rounded=listener.on_rounded,
            on_rare_experts=listener.on_rare_experts,
            cache=job.cache,
        )
    job.decoder.hold([])
    return blocks


@torch.no_grad()
def _replace_parameters_(model: PreTrainedModel, blocks: Sequence[StoredBlock]) -> None:
    """Give the parameters of all blocks their stored values."""
    for block, values in enumerate(blocks):
        parameters = dict(model.model.layers[block].named_parameters())
        for name, value in values.items():
            stored = _unpacked(value)
            dense = stored.dequantize() if isinstance(stored, QuantizedWeight) else stored
            parameters[name].copy_(dense)


def _packed(value: QuantizedWeight | Tensor) -> PackedCodes | Tensor:
    """Return codes packed, and other parameters in a copy of their own."""
    if isinstance(value, QuantizedWeight):
        return PackedCodes.of(value)
    return value.detach().to("cpu", copy=True)


def _unpacked(value: PackedCodes | Tensor) -> QuantizedWeight | Tensor:
    return value.unpack() if isinstance(value, PackedCodes) else value
