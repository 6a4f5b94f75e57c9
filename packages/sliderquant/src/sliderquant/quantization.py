"""The ``quantize`` command: model directory in, quantized model directory out."""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from effml_common import checkpoint
from effml_common.cli import dump_config
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, rank, say, warn
from effml_common.report import Report, Row, environment, write_report
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.export import ModelWriter
from sliderquant.adapters.files import weight_files
from sliderquant.adapters.formats import check_expressible
from sliderquant.adapters.heap import return_large_blocks
from sliderquant.adapters.processes import process_group, wait_for_all
from sliderquant.adapters.shards import STAGING
from sliderquant.adapters.streaming import StreamedModel, open_model
from sliderquant.adapters.text import calibration_samples, encode, read_documents
from sliderquant.calibration import WindowResult, activation_format, calibrate, run_blocks
from sliderquant.card import file_hashes, made_section, model_card
from sliderquant.config import FULL_BITS, QuantizeConfig, SliderConfig
from sliderquant.evaluation import chunks, default_seqlen
from sliderquant.learnables import BlockLearnables
from sliderquant.plan import Plan, decoder_shape, make_plan
from sliderquant.simulation import (
    blockwise_perplexity,
    finished_block,
    fresh_learnables,
    learned,
    rounded,
    weight_format,
)

Texts = dict[str, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one run works on."""

    config: QuantizeConfig
    opened: StreamedModel
    samples: Tensor
    texts: Texts
    plan: Plan
    learnables: Sequence[BlockLearnables]
    cache: ActivationCache
    out: Path


def quantize(config: QuantizeConfig) -> Report:
    """Quantize a model directory and write one that transformers loads.

    The model is read block by block. Nothing is written before model, data and settings have been
    checked. The run folder is ``<out>/run``; with ``resume="auto"`` an interrupted run in the same
    folder continues and ends with the same bits. Under ``torchrun`` every process computes a part of
    each batch, and the first one writes.

    Returns:
        The report that is also written to ``<out>/run``.

    Raises:
        InputError: If the model, a file or a setting cannot be used.
        CalibrationDivergedError: If a window diverges at three learning rates.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/quantize-%Y%m%d-%H%M%S"))
    if rank() == 0:
        _check_out(out, config.resume)
    with process_group(config.device) as device:
        opened = open_model(
            config.model,
            device=device,
            rotate=config.rotate,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        folder = out / "run" / "cache" if config.cache == "disk" else None
        with ActivationCache(folder) as cache:
            job = _prepare(config, opened, cache, out)
            opened.source.check_finite()
            if job.plan.lean:
                return_large_blocks()
            _announce(job)
            rows = _reference_rows(job)
            _calibrate_saved(job)
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
) -> _Job:
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
    return _Job(
        config=config,
        opened=opened,
        samples=samples,
        texts=texts,
        plan=make_plan(config, decoder_shape(opened.decoder), opened.decoder.depth),
        learnables=learnables,
        cache=cache,
        out=out,
    )


def _announce(job: _Job) -> None:
    """Print the estimate of time, memory and disk, from one timed forward pass of block 0."""
    decoder, config = job.opened.decoder, job.config
    if config.schedule == "slider" and decoder.depth < config.shallow + config.deep:
        warn(
            f"{decoder.depth} blocks are fewer than shallow + deep = {config.shallow + config.deep}: "
            "they are halved between both ends"
        )
    decoder.hold([0])
    hidden = decoder.block_inputs(job.samples[: config.batch_size])
    run_blocks(decoder, [0], hidden, config.batch_size)
    begin = time.perf_counter()
    run_blocks(decoder, [0], hidden, config.batch_size)
    seconds = time.perf_counter() - begin
    decoder.hold([])
    # Forward, backward, and about as much again for the fake quantizer: measured 3.5 to 5 forwards.
    batches = -(-len(job.samples) // config.batch_size)
    total = 4 * seconds * job.plan.block_visits * config.epochs * batches
    memory = sum((job.plan.memory_gib or {}).values())
    disk = sum(path.stat().st_size for path in weight_files(config.model)) / 2**30
    say(
        f"{len(job.plan.windows)} windows x {job.plan.stages} stages, {job.plan.updates} updates: about "
        f"{max(1, round(total / 60))} min, {memory:.2f} GiB memory, {disk:.2f} GiB disk at most"
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


def _mean_bits(job: _Job) -> float:
    """Stored bits per quantized weight, with scales in the checkpoint's type."""
    if job.config.wbits == FULL_BITS:
        return 8.0 * job.opened.dtype.itemsize
    fmt = weight_format(job.config, job.opened.dtype)
    shapes = decoder_shape(job.opened.decoder).linears.values()
    stored = sum(math.prod(shape) * fmt.bits_per_weight(shape[-1]) for shape in shapes)
    return stored / sum(map(math.prod, shapes))


def _reference_rows(job: _Job) -> list[Row]:
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


def _result_row(job: _Job) -> Row:
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
    return Row(f"SliderQuant ({job.config.schedule})", _setting(job.config), metrics)


def _report(job: _Job, rows: list[Row], started: float) -> Report:
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
            f"intra_order={job.config.intra_order}, {orders[job.config.intra_order]}",
            f"stored as {job.config.format}; bits per weight counts the packed size",
        ],
        files=sorted(path.name for path in job.out.iterdir() if path.is_file()),
        environment=environment(("transformers", "tokenizers"), job.config.device),
    )


def _fingerprint(config: QuantizeConfig, samples: Tensor) -> str:
    """Hash what must be the same for a run to be continued."""
    method = {field.name: getattr(config, field.name) for field in fields(SliderConfig)}
    libraries = {name: version(name) for name in ("sliderquant", "torch", "transformers")}
    sha = hashlib.sha256(json.dumps([method, libraries], sort_keys=True).encode())
    sha.update(samples.numpy().tobytes())
    for path in weight_files(config.model):
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _calibrate_saved(job: _Job) -> None:
    """Calibrate with a checkpoint after every window, continuing from the last one if there is one."""
    config, decoder, learnables = job.config, job.opened.decoder, job.learnables
    run = job.out / "run"
    checkpoints = run / "checkpoints"
    fingerprint = _fingerprint(config, job.samples)
    done = _restore_(learnables, checkpoints, fingerprint) if checkpoints.is_dir() else 0
    wait_for_all()  # before the first process writes what the others look for
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / "config.yaml", dump_config(config))
    wait_for_all()
    write_block = _block_writer(job, fingerprint)
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", job.plan.updates) as bar,
    ):
        bar.advance(done * job.plan.updates // (job.plan.stages * len(job.plan.windows)))
        clock = _WindowClock(job.plan, done)

        def on_update(loss: float) -> None:
            bar.advance(loss=f"{loss:.3g}")
            stop.check()  # the last finished window is saved

        def on_window(result: WindowResult) -> None:
            # Logged first: a resumed run drops lines that no checkpoint covers.
            metrics = {f.name: getattr(result, f.name) for f in fields(WindowResult)}
            log.log(metrics.pop("step"), metrics)
            tensors = {
                f"{block}.{name}": value
                for block, made in enumerate(learnables)
                for name, value in made.state_dict().items()
            }
            checkpoint.save(checkpoints, result.step, tensors, {"fingerprint": fingerprint}, keep=2)
            clock.tell(result)

        calibrate(
            decoder,
            job.samples,
            job.plan.windows,
            learnables,
            config,
            done=done,
            on_update=on_update,
            on_window=on_window,
            on_block=write_block,
            on_experts=_tell_experts(config.min_expert_tokens),
            cache=job.cache,
        )


def _block_writer(job: _Job, fingerprint: str) -> Callable[[int], None]:
    """Return what to do with each block when it is final; the last one publishes the model."""
    config, opened = job.config, job.opened
    if rank() > 0:
        return lambda block: None
    for stale in job.out.glob(".*.tmp"):  # a kill in the middle of a small file
        stale.unlink()
    if (job.out / "config.json").exists():  # it was published before the run was stopped
        shutil.rmtree(job.out / STAGING, ignore_errors=True)
        return lambda block: None
    untied = config.rotate in ("r1", "both")
    writer = ModelWriter(
        job.out,
        config.model,
        format=config.format,
        dtype=opened.dtype,
        config_changes={"tie_word_embeddings": False} if untied else None,
        activations=activation_format(config),
        container_bits=config.container_bits,
        identity=fingerprint,
    )

    def write(block: int) -> None:
        finished = finished_block(
            opened.decoder, job.learnables[block], block, config.format != "pre-quant"
        )
        writer.write({f"model.layers.{block}.{name}": value for name, value in finished.items()})
        if block == opened.decoder.depth - 1:
            writer.write(opened.source.outside())
            writer.publish()

    return write


class _WindowClock:
    """Says how long each window took and how much time is left."""

    def __init__(self, plan: Plan, done: int) -> None:
        self._total = plan.stages * len(plan.windows)
        self._left = plan.stages * plan.block_visits
        self._skipped = done
        self._visited = 0
        self._start = self._last = time.monotonic()

    def tell(self, result: WindowResult) -> None:
        """Print one line for a finished window."""
        now = time.monotonic()
        self._visited += len(result.window)
        share = self._visited / (self._visited + self._remaining(result))
        left = (now - self._start) * (1 - share) / share
        blocks = "-".join(map(str, sorted({result.window[0], result.window[-1]})))
        say(
            f"window {result.step}/{self._total} (blocks {blocks}, ratio {result.ratio:g}): "
            f"{now - self._last:.1f} s, loss {result.first_loss:.3g} -> {result.last_loss:.3g}, "
            f"about {left:.0f} s left"
        )
        self._last = now

    def _remaining(self, result: WindowResult) -> float:
        # Windows differ in size; the average is near enough.
        return self._left / self._total * (self._total - result.step)


def _tell_experts(minimum: int) -> Callable[[int, Tensor], None]:
    def tell(block: int, counts: Tensor) -> None:
        rare = (counts < minimum).nonzero().flatten().tolist()
        say(f"block {block}: experts received {counts.min()} to {counts.max()} tokens")
        if rare:
            warn(
                f"block {block}: {len(rare)} of {len(counts)} experts received fewer than {minimum} "
                "tokens and are rounded without training; give more text"
            )

    return tell


def _restore_(learnables: Sequence[BlockLearnables], checkpoints: Path, fingerprint: str) -> int:
    """Load the newest intact checkpoint into the learnables; return the finished windows."""
    found = checkpoint.latest(checkpoints)
    if found is None:
        return 0
    if found.state.get("fingerprint") != fingerprint:
        raise InputError(
            f"{checkpoints} belongs to another model, text, setting or library version; "
            "choose another --out or restore what changed"
        )
    for block, made in enumerate(learnables):
        prefix = f"{block}."
        made.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in found.tensors.items()
                if name.startswith(prefix)
            }
        )
    say(f"resuming after {found.step} finished windows")
    return found.step
