"""What one run of ``quantize`` works on: everything read, checked and planned, nothing written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.formats import check_expressible
from sliderquant.adapters.input_files import InputFile, InputFiles
from sliderquant.adapters.model_folder import StreamedModel
from sliderquant.adapters.shapes import decoder_shape
from sliderquant.adapters.simulation import fresh_learnables, weight_format
from sliderquant.adapters.text import (
    begin_note,
    begin_tokens,
    calibration_samples,
    chunks,
    default_seqlen,
    read_tokens,
)
from sliderquant.commands.inspect import Plan, make_plan
from sliderquant.config import FULL_BITS, QuantizeConfig
from sliderquant.method.activations import ActivationFormat, activation_format
from sliderquant.method.decoder import Decoder
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.quantizer import WeightFormat

Texts = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run works on.

    Attributes:
        config: Settings of the command.
        opened: The model's folder: source of the weights, tokenizer and config.
        decoder: The model, whose weights are read block by block.
        files: Its weight files.
        samples: Calibration samples, token ids [n, t].
        calib_hashes: The sha256 of what was read of each calibration file, by its name.
        texts: Chunks of the texts to measure on, by the metric's name.
        begin_note: What every sample and chunk starts with, in a line.
        plan: Windows, cost and memory.
        weights: Storage format of the quantized weights.
        activations: Rounding of activations, or ``None``.
        bits_per_weight: Stored bits per quantized weight, scales in the checkpoint's type included.
        learnables: One for each block, not trained yet.
        cache: Where hidden states of the samples live.
        out: Folder of the result.
    """

    config: QuantizeConfig
    opened: StreamedModel
    decoder: Decoder
    files: Sequence[Path]
    samples: Tensor
    calib_hashes: Mapping[str, str]
    texts: Texts
    begin_note: str
    plan: Plan
    weights: WeightFormat
    activations: ActivationFormat | None
    bits_per_weight: float
    learnables: Sequence[BlockLearnables]
    cache: ActivationCache
    out: Path


def prepare_job(
    config: QuantizeConfig, opened: StreamedModel, cache: ActivationCache, out: Path
) -> Job:
    """Read the text, make the plan and the learnables.

    Raises:
        InputError: If text, settings and model do not fit one another.
    """
    # Each file is opened once, also one that both settings name.
    inputs = InputFiles()
    calib = inputs.read(config.calib, "calib", beside=config.eval_text)
    eval_text = inputs.read(config.eval_text, "eval_text", beside=config.calib)

    # Tokens to calibrate on, and to measure on, as the tokenizer begins a text.
    begin = begin_tokens(opened.tokenizer)
    stream = read_tokens(calib, opened.tokenizer, opened.decoder.model)
    seqlen = min(config.seqlen, opened.context)
    samples = calibration_samples(stream, config.nsamples, seqlen, config.seed, begin)
    texts = {f"perplexity {file.name}": _eval_chunks(file, opened, begin) for file in eval_text}

    # Windows and formats follow from the settings and the shapes alone.
    shape = decoder_shape(opened.decoder)
    plan = make_plan(config, shape, shape.layers)
    activations = activation_format(config)
    weights = weight_format(config, opened.dtype)
    rounded = config.wbits != FULL_BITS
    learnables = fresh_learnables(opened.decoder, config, opened.dtype)
    formats = {
        f"model.layers.{block}.{name}": weights
        for block, learned in enumerate(learnables)
        for name in learned.names
        if rounded
    }
    check_expressible(config.format, formats, activations)
    return Job(
        config=config,
        opened=opened,
        decoder=opened.decoder,
        files=opened.source.files,
        samples=samples,
        calib_hashes={file.name: file.sha256 for file in calib},
        texts=texts,
        begin_note=begin_note(begin, opened.tokenizer),
        plan=plan,
        weights=weights,
        activations=activations,
        bits_per_weight=(
            weights.mean_bits_per_weight(shape.linears.values())
            if rounded
            else 8.0 * opened.dtype.itemsize
        ),
        learnables=learnables,
        cache=cache,
        out=out,
    )


def _eval_chunks(file: InputFile, opened: StreamedModel, begin: Sequence[int]) -> list[Tensor]:
    """Cut one text to measure on into chunks, whose length does not follow from the settings."""
    stream = read_tokens([file], opened.tokenizer, opened.decoder.model)
    remedy = (
        "give more text, or measure it with eval --seqlen (here --seqlen is of calibration alone)"
    )
    seqlen = default_seqlen(opened.context)
    return list(chunks(stream, seqlen, begin=begin, name=file.name, remedy=remedy))
