"""What one run of ``quantize`` works on: everything read, checked and planned, nothing written."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.formats import check_expressible
from sliderquant.adapters.gguf import check_gguf
from sliderquant.adapters.input_files import InputFile, InputFiles
from sliderquant.adapters.layer_bits import (
    BlockBits,
    check_servable,
    describe_bits,
    layer_bits,
    mean_bits_per_weight,
)
from sliderquant.adapters.model_folder import StreamedModel
from sliderquant.adapters.released_parameters import released_learnables
from sliderquant.adapters.shapes import ModelShape, decoder_shape
from sliderquant.adapters.simulation import fresh_learnables
from sliderquant.adapters.text import (
    begin_note,
    begin_tokens,
    calibration_samples,
    chunks,
    default_seqlen,
    read_tokens,
)
from sliderquant.commands._sensitive_layers import bits_for, read_outstanding
from sliderquant.commands.inspect import Plan, make_plan
from sliderquant.config import QuantizeConfig, SliderConfig
from sliderquant.method.activations import ActivationFormat
from sliderquant.method.calibration import rounding_of_inputs
from sliderquant.method.decoder import Decoder
from sliderquant.method.layout import layer_groups
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.quantizer import WeightFormat

Texts = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """What one calibration works on, wherever the model and the samples come from.

    Attributes:
        config: Settings of the method.
        decoder: The model, whose weights are read block by block.
        samples: Calibration samples, token ids [n, t]; none where nothing is calibrated.
        plan: Windows, cost and memory.
        formats: Storage formats of the weights that are rounded, by name, for each block.
        activations: Rounding of activations, or ``None``.
        learnables: One for each block, not trained yet, or with the parameters of a file.
        cache: Where hidden states of the samples live.
    """

    config: SliderConfig
    decoder: Decoder
    samples: Tensor
    plan: Plan
    formats: Sequence[Mapping[str, WeightFormat]]
    activations: ActivationFormat | None
    learnables: Sequence[BlockLearnables]
    cache: ActivationCache

    @property
    def disk_bytes(self) -> int:
        """What the result takes on disk at most."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Job(CalibrationJob):
    """What one run of the command works on.

    Attributes:
        config: Settings of the command.
        opened: The model's folder: source of the weights, tokenizer and config.
        files: Its weight files.
        calib_hashes: The sha256 of what was read of each calibration file, by its name; that of the
            file of parameters if there is one.
        texts: Chunks of the texts to measure on, by the metric's name.
        begin_note: What every sample and chunk starts with, in a line.
        bits: How many layers have how many bits, in a line; empty where all have the same.
        bits_per_weight: Stored bits per linear weight, scales in the checkpoint's type included.
        out: Folder of the result.
    """

    config: QuantizeConfig
    opened: StreamedModel
    files: Sequence[Path]
    calib_hashes: Mapping[str, str]
    texts: Texts
    begin_note: str
    bits: str
    bits_per_weight: float
    out: Path

    @property
    def disk_bytes(self) -> int:
        """What the result takes on disk at most."""
        return sum(path.stat().st_size for path in self.files)


def prepare_job(
    config: QuantizeConfig, opened: StreamedModel, cache: ActivationCache, out: Path
) -> Job:
    """Read the text, make the plan and the learnables.

    Raises:
        InputError: If text, settings and model do not fit one another.
    """
    # Bits of single layers, also those that a report asks for.
    shape = decoder_shape(opened.decoder)
    config = _with_sensitive_layers(config, shape)
    bits = layer_bits(config, shape.blocks)

    # Each file is opened once, also one that both settings name.
    inputs = InputFiles()
    calib = inputs.read(config.calib, "calib", beside=config.eval_text)
    eval_text = inputs.read(config.eval_text, "eval_text", beside=config.calib)

    # Tokens to calibrate on, and to measure on, as the tokenizer begins a text.
    begin = begin_tokens(opened.tokenizer)
    samples = torch.empty(0, 0, dtype=torch.int64)
    if config.parameters is None:
        stream = read_tokens(calib, opened.tokenizer, opened.decoder.model)
        seqlen = min(config.seqlen, opened.context)
        samples = calibration_samples(stream, config.nsamples, seqlen, config.seed, begin)
    texts = {f"perplexity {file.name}": _eval_chunks(file, opened, begin) for file in eval_text}

    # Windows and formats follow from the settings and the shapes alone.
    plan = make_plan(config, shape, shape.layers)
    if config.parameters is None:
        learnables = fresh_learnables(opened.decoder, config, opened.dtype)
    else:
        learnables = released_learnables(config.parameters, opened.decoder, config, opened.dtype)
    activations = rounding_of_inputs(config, learnables)
    formats = [learned.rounded_formats() for learned in learnables]
    mean_bits = mean_bits_per_weight(shape.blocks, formats, opened.dtype)
    _check_storage(config, opened.decoder, bits, formats, activations)
    if config.for_ == "gguf":
        _check_gguf_export(opened)
    return Job(
        config=config,
        opened=opened,
        decoder=opened.decoder,
        files=opened.source.files,
        samples=samples,
        calib_hashes=_hashes(config, calib),
        texts=texts,
        begin_note=begin_note(begin, opened.tokenizer),
        plan=plan,
        formats=formats,
        bits=f"{describe_bits(bits)}; {mean_bits:.3f} bits per weight"
        if config.has_mixed_bits
        else "",
        activations=activations,
        bits_per_weight=mean_bits,
        learnables=learnables,
        cache=cache,
        out=out,
    )


def _hashes(config: QuantizeConfig, calib: Sequence[InputFile]) -> dict[str, str]:
    """Return the sha256 of the files that the result follows from, by their names."""
    if config.parameters is None:
        return {file.name: file.sha256 for file in calib}
    with Path(config.parameters).open("rb") as file:
        return {Path(config.parameters).name: hashlib.file_digest(file, "sha256").hexdigest()}


def _with_sensitive_layers(config: QuantizeConfig, shape: ModelShape) -> QuantizeConfig:
    """Return the settings with what a report of ``sensitivity`` asks for among ``bits_for``."""
    if config.sensitivity is None or config.sensitive_bits is None:
        return config
    sensitive = read_outstanding(config.sensitivity, [tuple(names) for names in shape.blocks])
    if not sensitive:
        warn(f"{config.sensitivity}: nothing stands out, so all layers have {config.wbits} bits")
    entries = bits_for(sensitive, config.sensitive_bits)
    return replace(
        config, sensitivity=None, sensitive_bits=None, bits_for=(*entries, *config.bits_for)
    )


def _check_storage(
    config: QuantizeConfig,
    decoder: Decoder,
    bits: Sequence[BlockBits],
    formats: Sequence[Mapping[str, WeightFormat]],
    activations: ActivationFormat | None,
) -> None:
    """Refuse what the format of the result cannot express, and warn about what servers do not load."""
    names = {
        f"model.layers.{block}.{name}": fmt
        for block, of_block in enumerate(formats)
        for name, fmt in of_block.items()
    }
    plain = [
        f"model.layers.{block}.{name}"
        for block, of_block in enumerate(bits)
        for name in of_block
        if name not in formats[block]
    ]
    check_expressible(config.format, names, activations, plain)
    if config.format == "compressed-tensors":
        groups = [layer_groups(decoder.layout(block)) for block in range(decoder.depth)]
        check_servable(bits, groups)


def _check_gguf_export(opened: StreamedModel) -> None:
    """Warn where the file for which the codes are made cannot be written; gptq may be exported still."""
    try:
        check_gguf(opened.written_config)
    except InputError as error:
        warn(f"export --format gguf will refuse this model: {error}")


def _eval_chunks(file: InputFile, opened: StreamedModel, begin: Sequence[int]) -> list[Tensor]:
    """Cut one text to measure on into chunks, whose length does not follow from the settings."""
    stream = read_tokens([file], opened.tokenizer, opened.decoder.model)
    remedy = (
        "give more text, or measure it with eval --seqlen (here --seqlen is of calibration alone)"
    )
    seqlen = default_seqlen(opened.context)
    return list(chunks(stream, seqlen, begin=begin, name=file.name, remedy=remedy))
