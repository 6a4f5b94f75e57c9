"""The ``quantize`` command: model directory in, quantized model directory out."""

import math
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.logging import rank, say, warn
from effml_common.report import Report, Row, environment, write_report
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.files import weight_files
from sliderquant.adapters.formats import check_expressible
from sliderquant.adapters.heap import return_large_blocks
from sliderquant.adapters.processes import process_group
from sliderquant.adapters.shapes import decoder_shape
from sliderquant.adapters.simulation import (
    blockwise_perplexity,
    fresh_learnables,
    learned,
    rounded,
    weight_format,
)
from sliderquant.adapters.streaming import StreamedModel, open_model
from sliderquant.adapters.text import (
    calibration_samples,
    chunks,
    default_seqlen,
    encode,
    read_documents,
)
from sliderquant.commands._estimates import estimated_seconds
from sliderquant.commands._model_card import file_hashes, made_section, model_card
from sliderquant.commands._resumable import Job, calibrate_saved
from sliderquant.commands.inspect import make_plan
from sliderquant.config import FULL_BITS, QuantizeConfig, SliderConfig, with_rounding
from sliderquant.method.calibration import activation_format


def quantize(config: QuantizeConfig) -> Report:
    """Quantize a model directory and write one that transformers loads.

    The model is read block by block. Nothing is written before model, data and settings have been
    checked. The run folder is ``<out>/run``; with ``resume="auto"`` an interrupted run in the same
    folder continues and ends with the same bits. Under ``torchrun`` every process computes a part of
    each batch, and the first one writes.

    Returns:
        The report that is also written to ``<out>/run``.

    Raises:
        InputError: If the model, a file, the device or a setting cannot be used.
        CalibrationDivergedError: If a window diverges at three learning rates.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/quantize-%Y%m%d-%H%M%S"))
    if rank() == 0:
        _check_out(out, config.resume)
    # Windows compute in float32; compensated rounding and rotations need double precision.
    float64 = config.rounding != "nearest" or config.rotate != "none"
    with process_group(config.device, float64=float64) as device:
        opened = open_model(
            config.model,
            device=device,
            rotate=config.rotate,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        config = with_rounding(config, decoder_shape(opened.decoder).linears.values())
        folder = out / "run" / "cache" if config.cache == "disk" else None
        with ActivationCache(folder) as cache:
            job = _prepare(config, opened, cache, out)
            opened.source.check_finite()
            if job.plan.lean:
                return_large_blocks()
            _announce(job)
            rows = _reference_rows(job)
            calibrate_saved(job)
            rows.append(_result_row(job))
            report = _report(job, rows, started)
    write_report(report, out / "run")
    if rank() == 0:
        _write_card(config, report, out)
    loader = "sliderquant.load" if config.format == "native" else "from_pretrained of transformers"
    say(f"wrote {out}; load it with {loader}")
    return report


def _write_card(config: QuantizeConfig, report: Report, out: Path) -> None:
    """Write the model card; the figures are known only after the weights are written."""
    settings = {field.name: getattr(config, field.name) for field in fields(SliderConfig)}
    made = made_section(report, settings, file_hashes(config.calib), _setting(config))
    atomic_write(out / "README.md", model_card(out, Path(config.model).name, made))


def _check_out(out: Path, resume: str) -> None:
    """Refuse a folder that holds something, unless it is to be continued."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if resume == "never":
        raise InputError(f"{out} is not empty; choose another --out or add --resume auto")
    if not (out / "run").is_dir():
        raise InputError(f"{out} holds no run to resume; choose another --out")


def _prepare(
    config: QuantizeConfig, opened: StreamedModel, cache: ActivationCache, out: Path
) -> Job:
    """Read the text, make the windows and the learnables; nothing is written."""
    stream = encode(read_documents(config.calib, opened.tokenizer), opened.tokenizer)
    vocabulary = opened.config.vocab_size
    if int(stream.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer makes token {int(stream.max())}, the model knows {vocabulary}; "
            "use the tokenizer that belongs to it"
        )
    samples = calibration_samples(
        stream, config.nsamples, min(config.seqlen, opened.context), config.seed
    )
    texts = {
        f"perplexity {Path(path).name}": list(
            chunks(
                encode(read_documents([path], opened.tokenizer), opened.tokenizer),
                default_seqlen(opened.context),
            )
        )
        for path in config.eval_text
    }
    learnables = fresh_learnables(opened.decoder, config, opened.dtype)
    formats = {
        f"model.layers.{block}.{name}": made.fmt
        for block, made in enumerate(learnables)
        for name in made.names
        if config.wbits != FULL_BITS
    }
    check_expressible(config.format, formats, activation_format(config))
    return Job(
        config=config,
        opened=opened,
        samples=samples,
        texts=texts,
        plan=make_plan(config, decoder_shape(opened.decoder), opened.decoder.depth),
        learnables=learnables,
        cache=cache,
        out=out,
    )


def _announce(job: Job) -> None:
    """Print the estimate of time, memory and disk."""
    decoder, config = job.opened.decoder, job.config
    slides = job.plan.windows and config.schedule == "slider"
    if slides and decoder.depth < config.shallow + config.deep:
        warn(
            f"{decoder.depth} blocks are fewer than shallow + deep = {config.shallow + config.deep}: "
            "they are halved between both ends"
        )
    total = estimated_seconds(
        decoder, job.samples, job.plan, config, weight_format(config, job.opened.dtype)
    )
    if job.plan.windows:
        work = f"{len(job.plan.windows)} windows x {job.plan.stages} stages, {job.plan.updates} updates"
    else:
        work = f"{decoder.depth} blocks to round"
    memory = sum((job.plan.memory_gib or {}).values())
    disk = sum(path.stat().st_size for path in weight_files(config.model)) / 2**30
    say(
        f"{work}: about {max(1, round(total / 60))} min, {memory:.2f} GiB memory, "
        f"{disk:.2f} GiB disk at most"
    )


def _setting(config: SliderConfig) -> str:
    groups = f"g{config.group_size}" if config.group_size else "per row"
    grid = "sym" if config.sym else "asym"
    name = f"W{config.wbits} {groups} {grid}"
    if config.abits != FULL_BITS:
        name += f", A{config.abits} per token {'sym' if config.act_sym else 'asym'}"
        name += " with Q, K, V" if config.quantize_attention else ""
    if config.rotate != "none":
        name += f", rotated ({config.rotate})"
    return f"{name}, calibration seed {config.seed}"


def _mean_bits(job: Job) -> float:
    """Stored bits per quantized weight, with scales in the checkpoint's type."""
    if job.config.wbits == FULL_BITS:
        return 8.0 * job.opened.dtype.itemsize
    fmt = weight_format(job.config, job.opened.dtype)
    shapes = decoder_shape(job.opened.decoder).linears.values()
    stored = sum(math.prod(shape) * fmt.bits_per_weight(shape[-1]) for shape in shapes)
    return stored / sum(map(math.prod, shapes))


def _reference_rows(job: Job) -> list[Row]:
    """Full precision and round-to-nearest, to stand beside the result."""
    if not job.texts:
        return []
    opened, config = job.opened, job.config
    full = blockwise_perplexity(opened.decoder, job.texts, lambda block: None, cache=job.cache)
    metrics = {name: [value] for name, value in full.items()}
    bits = {"bits per weight": [8.0 * opened.dtype.itemsize]}
    rows = [Row("full precision", str(opened.dtype), metrics | bits)]
    if config.wbits != FULL_BITS:
        rtn = blockwise_perplexity(
            opened.decoder,
            job.texts,
            rounded(opened.decoder, weight_format(config, opened.dtype)),
            activation_format(config),
            job.cache,
        )
        metrics = {name: [value] for name, value in rtn.items()}
        bits = {"bits per weight": [_mean_bits(job)]}
        rows.append(Row("round-to-nearest", _setting(config), metrics | bits))
    return rows


def _result_row(job: Job) -> Row:
    decoder = job.opened.decoder
    measured = blockwise_perplexity(
        decoder,
        job.texts,
        learned(decoder, job.learnables),
        activation_format(job.config),
        job.cache,
    )
    metrics = {name: [value] for name, value in measured.items()}
    metrics["bits per weight"] = [_mean_bits(job)]
    way = f"SliderQuant ({job.config.schedule})" if job.plan.windows else "compensated rounding"
    return Row(way, _setting(job.config), metrics)


def _report(job: Job, rows: list[Row], started: float) -> Report:
    orders = {"network": "as in the released code", "window": "as in the paper's text"}
    return Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=sys.argv,
        seeds=[job.config.seed],
        seconds=time.monotonic() - started,
        rows=rows,
        claims=[],
        notes=[
            *(
                [f"intra_order={job.config.intra_order}, {orders[job.config.intra_order]}"]
                if job.plan.windows
                else []
            ),
            f"stored as {job.config.format}; bits per weight counts the packed size",
        ],
        files=sorted(path.name for path in job.out.iterdir() if path.is_file()),
        environment=environment(("transformers", "tokenizers"), str(job.opened.decoder.device)),
    )
