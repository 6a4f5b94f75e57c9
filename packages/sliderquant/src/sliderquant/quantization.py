"""The ``quantize`` command: model directory in, quantized model directory out."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effml_common import checkpoint
from effml_common.cli import dump_config
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.interrupt import StopSignal
from effml_common.logging import RunLog, say
from effml_common.report import Report, Row, environment, write_report
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import LoadedModel, load_model, save_model, weight_files
from sliderquant.adapters.text import calibration_samples, encode, read_documents
from sliderquant.baselines import rtn_weights
from sliderquant.calibration import WindowResult, calibrate, run_blocks, seeded
from sliderquant.config import QuantizeConfig, SliderConfig
from sliderquant.evaluation import chunks, default_seqlen, perplexity
from sliderquant.learnables import BlockLearnables
from sliderquant.plan import Plan, check_group_size, make_plan
from sliderquant.quantizer import WeightFormat

BlockWeights = Sequence[dict[str, Tensor]]


def weight_format(config: SliderConfig, dtype: torch.dtype) -> WeightFormat:
    """Return the storage format that ``config`` asks for, with scales in ``dtype``."""
    return WeightFormat(
        bits=config.wbits, group_size=config.group_size, sym=config.sym, dtype=dtype
    )


def fresh_learnables(
    decoder: TransformersDecoder, config: SliderConfig, dtype: torch.dtype
) -> list[BlockLearnables]:
    """Return untrained learnables for every block, on the model's device.

    Raises:
        ShapeError: If the group size does not divide some layer.
    """
    fmt = weight_format(config, dtype)
    learnables = []
    for block in range(decoder.depth):
        weights = decoder.linear_weights(block)
        check_group_size({name: tuple(w.shape) for name, w in weights.items()}, config.group_size)
        generator = seeded((config.seed, block))
        sites = decoder.layout(block).sites if config.scales_channels else ()
        made = BlockLearnables(weights, fmt, config.lora_rank, generator, sites)
        learnables.append(made.to(next(iter(weights.values())).device))
    return learnables


@torch.no_grad()
def simulated_weights(
    decoder: TransformersDecoder, learnables: Sequence[BlockLearnables]
) -> list[dict[str, Tensor]]:
    """Return the dequantized weights of every block: what a merged model holds."""
    return [learnables[block](decoder.tensors(block)) for block in range(decoder.depth)]


def simulated_logits(
    decoder: TransformersDecoder, weights: BlockWeights | None
) -> Callable[[Int[Tensor, "b t"]], Float[Tensor, "b t v"]]:
    """Return a function from tokens to logits with replaced weights; ``None`` for the model's own."""

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        hidden = decoder.block_inputs(tokens)
        for block in range(decoder.depth):
            hidden = decoder.run_block(block, hidden, weights[block] if weights else None)
        return decoder.logits(hidden)

    return logits


@torch.no_grad()
def merge_(decoder: TransformersDecoder, weights: BlockWeights) -> None:
    """Copy dequantized weights into the model, in place."""
    for block, replaced in enumerate(weights):
        for name, weight in decoder.linear_weights(block).items():
            weight.copy_(replaced[name])


def quantize(config: QuantizeConfig) -> Report:
    """Quantize a model directory and write one that transformers loads.

    Nothing is written before model, data and settings have been checked. The run folder is
    ``<out>/run``; with ``resume="auto"`` an interrupted run in the same folder continues and ends
    with the same bits.

    Returns:
        The report that is also written to ``<out>/run``.

    Raises:
        InputError: If the model, a file or a setting cannot be used.
        CalibrationDivergedError: If a window diverges at three learning rates.
    """
    started = time.monotonic()
    out = Path(config.out or time.strftime("runs/quantize-%Y%m%d-%H%M%S"))
    _check_out(out, config.resume)
    loaded = load_model(config.model, config.device)
    stream = encode(read_documents(config.calib, loaded.tokenizer), loaded.tokenizer)
    samples = calibration_samples(
        stream, config.nsamples, min(config.seqlen, loaded.context), config.seed
    )
    texts = {
        f"perplexity {Path(path).name}": list(
            chunks(
                encode(read_documents([path], loaded.tokenizer), loaded.tokenizer),
                default_seqlen(loaded.context),
            )
        )
        for path in config.eval_text
    }
    decoder = TransformersDecoder(loaded.model)
    plan = make_plan(config, None, decoder.depth)
    learnables = fresh_learnables(decoder, config, loaded.dtype)
    _announce(decoder, samples, plan, config)

    rows = _reference_rows(decoder, loaded, texts, config)
    _calibrate_saved(decoder, samples, plan, learnables, config, out / "run")
    weights = simulated_weights(decoder, learnables)
    logits = simulated_logits(decoder, weights)
    metrics = {name: [perplexity(logits, text)] for name, text in texts.items()}
    fmt = weight_format(config, loaded.dtype)
    metrics["bits per weight"] = [_mean_bits(decoder, fmt)]
    rows.append(Row(f"SliderQuant ({config.schedule})", _setting(config), metrics))
    merge_(decoder, weights)
    save_model(loaded.model, config.model, out, loaded.dtype)
    report = Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=sys.argv,
        seeds=[config.seed],
        seconds=time.monotonic() - started,
        rows=rows,
        claims=[],
        notes=[
            "intra_order=network: one pass over all windows per intra-layer stage, "
            "as in the released code",
            "weights are stored dequantized; bits per weight counts their packed size",
        ],
        files=sorted(path.name for path in out.iterdir() if path.is_file()),
        environment=environment(("transformers", "tokenizers"), config.device),
    )
    write_report(report, out / "run")
    say(f"wrote {out}; load it with AutoModelForCausalLM.from_pretrained")
    return report


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


def _setting(config: SliderConfig) -> str:
    groups = f"g{config.group_size}" if config.group_size else "per row"
    grid = "sym" if config.sym else "asym"
    return f"W{config.wbits} {groups} {grid}, calibration seed {config.seed}"


def _mean_bits(decoder: TransformersDecoder, fmt: WeightFormat) -> float:
    weights = decoder.linear_weights(0).values()
    stored = sum(weight.numel() * fmt.bits_per_weight(weight.shape[1]) for weight in weights)
    return stored / sum(weight.numel() for weight in weights)


def _reference_rows(
    decoder: TransformersDecoder,
    loaded: LoadedModel,
    texts: dict[str, list[Tensor]],
    config: QuantizeConfig,
) -> list[Row]:
    """Full precision and round-to-nearest, to stand beside the result."""
    if not texts:
        return []
    fmt = weight_format(config, loaded.dtype)
    rounded = [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)]
    rows = []
    for name, weights in (("full precision", None), ("round-to-nearest", rounded)):
        logits = simulated_logits(decoder, weights)
        metrics = {text: [perplexity(logits, batches)] for text, batches in texts.items()}
        bits = _mean_bits(decoder, fmt) if weights else 8.0 * loaded.dtype.itemsize
        metrics["bits per weight"] = [bits]
        rows.append(Row(name, _setting(config) if weights else str(loaded.dtype), metrics))
    return rows


def _announce(
    decoder: TransformersDecoder, samples: Tensor, plan: Plan, config: SliderConfig
) -> None:
    """Print the estimate of time, memory and disk, from one timed forward pass of block 0."""
    hidden = decoder.block_inputs(samples[: config.batch_size])
    run_blocks(decoder, [0], hidden, config.batch_size)
    begin = time.perf_counter()
    run_blocks(decoder, [0], hidden, config.batch_size)
    seconds = time.perf_counter() - begin
    # Forward, backward, and about as much again for the fake quantizer: measured 3.5 to 5 forwards.
    batches = -(-len(samples) // config.batch_size)
    total = 4 * seconds * plan.block_visits * config.epochs * batches
    weights = sum(weight.numel() for weight in decoder.model.parameters())
    caches = 3 * samples.numel() * hidden.shape[-1]
    say(
        f"{len(plan.windows)} windows x {plan.stages} stages, {plan.updates} updates: about "
        f"{max(1, round(total / 60))} min, {4 * (weights + caches) / 2**30:.2f} GiB memory, "
        f"{4 * weights / 2**30:.2f} GiB disk at most"
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


def _calibrate_saved(
    decoder: TransformersDecoder,
    samples: Tensor,
    plan: Plan,
    learnables: Sequence[BlockLearnables],
    config: QuantizeConfig,
    run: Path,
) -> None:
    """Calibrate with a checkpoint after every window, continuing from the last one if there is one."""
    checkpoints = run / "checkpoints"
    fingerprint = _fingerprint(config, samples)
    done = _restore_(learnables, checkpoints, fingerprint) if checkpoints.is_dir() else 0
    run.mkdir(parents=True, exist_ok=True)
    atomic_write(run / "config.yaml", dump_config(config))
    with (
        StopSignal() as stop,
        RunLog(run, resume_step=done) as log,
        log.progress("calibrating", plan.updates) as bar,
    ):
        bar.advance(done * plan.updates // (plan.stages * len(plan.windows)))

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

        calibrate(
            decoder,
            samples,
            plan.windows,
            learnables,
            config,
            done=done,
            on_update=on_update,
            on_window=on_window,
        )


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
