"""The ``demo`` command: one small trained model, four ways to quantize it, the same data and cost.

Arms per bit width, all on the same calibration tokens:

* round-to-nearest, no calibration;
* block-wise reconstruction, the same code with windows of one block and no intra-layer stages (the
  setting of OmniQuant), with as many epochs as make its block visits equal to SliderQuant's;
* SliderQuant;
* compensated rounding, which trains nothing.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from effml_common.device import resolve_device
from effml_common.logging import RunLog, progress, say
from effml_common.report import Claim, Report, Row, environment, write_report
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.text import calibration_samples, encode
from sliderquant.baselines import rtn_weights
from sliderquant.calibration import calibrate
from sliderquant.config import DemoConfig, SliderConfig
from sliderquant.demo_model import demo_model, library_corpus
from sliderquant.evaluation import chunks, perplexity
from sliderquant.plan import make_plan
from sliderquant.simulation import (
    BlockWeights,
    fresh_learnables,
    simulated_logits,
    simulated_weights,
    weight_format,
)

GROUP_SIZE = 64
BATCH_SIZE = 4
EVAL_CHUNKS = 256
EVAL_BATCH = 32
# (correction, clipping): the best of three rates for each arm on the development text, at 2 bits and
# seed 0. The demo's seeds start at 1, so that the comparison runs on seeds no rate was chosen on.
LEARNING_RATES = {"block-wise": (5e-3, 1e-1), "SliderQuant": (1.5e-2, 3e-1)}
# An arm, and one that it should be better than.
CLAIMED = (
    ("SliderQuant", "round-to-nearest"),
    ("SliderQuant", "block-wise"),
    ("compensated", "SliderQuant"),
)
ARMS = ("round-to-nearest", *LEARNING_RATES, "compensated")

Texts = Mapping[str, Sequence[Tensor]]
# Perplexity by text, one entry per seed, of every (arm, bits).
Results = dict[tuple[str, int], list[dict[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A calibrated way to quantize, and its settings."""

    name: str
    config: SliderConfig


def arms(config: DemoConfig, bits: int, seed: int) -> list[Arm]:
    """Return block-wise reconstruction and SliderQuant at equal block visits.

    Args:
        config: Demo settings.
        bits: Bits per weight.
        seed: Of samples, batch order and initial values.
    """
    common = {
        "wbits": bits,
        "group_size": GROUP_SIZE,
        "sym": False,
        "batch_size": BATCH_SIZE,
        "nsamples": config.nsamples,
        "seqlen": config.context,
        "seed": seed,
    }
    rates = {name: {"lr_lora": lora, "lr_lwc": lwc} for name, (lora, lwc) in LEARNING_RATES.items()}
    slider = SliderConfig(
        **common, **rates["SliderQuant"], epochs=config.epochs, rounding="nearest"
    )
    visits = make_plan(slider, None, config.layers).block_visits
    epochs = round(config.epochs * visits / config.layers)
    block = SliderConfig(
        **common,
        **rates["block-wise"],
        schedule="block",
        gamma=1.0,
        epochs=epochs,
        rounding="nearest",
    )
    feedback = SliderConfig(**common, rounding="compensated")
    return [
        Arm(name="block-wise", config=block),
        Arm(name="SliderQuant", config=slider),
        Arm(name="compensated", config=feedback),
    ]


def calibrated_weights(
    decoder: TransformersDecoder, samples: Tensor, config: SliderConfig, description: str
) -> BlockWeights:
    """Calibrate one arm from scratch and return the simulated weights; the model stays as it is."""
    learnables = fresh_learnables(decoder, config, torch.float32)
    plan = make_plan(config, None, decoder.depth)
    with progress(description, plan.updates or decoder.depth) as bar:
        calibrate(
            decoder,
            samples,
            plan.windows,
            learnables,
            config,
            on_update=lambda loss: bar.advance(loss=f"{loss:.3g}"),
            on_block=lambda block: None if plan.windows else bar.advance(),
        )
    return simulated_weights(decoder, learnables)


def measure(
    decoder: TransformersDecoder, weights: BlockWeights | None, texts: Texts
) -> dict[str, float]:
    """Return the perplexity on each text, of the given weights or of the model's own."""
    logits = simulated_logits(decoder, weights)
    return {name: perplexity(logits, batches) for name, batches in texts.items()}


def demo(config: DemoConfig) -> Report:
    """Train the small model once, quantize it in every arm and seed, and write the comparison.

    Returns:
        The report: a row per bit width and arm, one value per seed; claims on paired gaps.

    Raises:
        NonFiniteError: If the training or a calibration diverges.
    """
    started = time.monotonic()
    device = resolve_device(config.device, float64=True)
    say("estimate: 9 min to train the model on the first run, then 3 min per seed; under 2 GiB")
    # Matrices this small gain nothing from a second thread, and beside any other busy process the
    # threads wait for one another: 8 times slower was measured.
    torch.set_num_threads(1)
    corpus = library_corpus()
    loaded = load_model(demo_model(config, corpus, device), device)
    decoder = TransformersDecoder(loaded.model)
    stream = encode(corpus.train, loaded.tokenizer)
    texts: Texts = {
        name: list(chunks(encode([text], loaded.tokenizer), config.context))[:EVAL_CHUNKS]
        for name, text in (("code", corpus.code), ("prose", corpus.prose))
    }
    texts = {name: torch.cat(list(part)).split(EVAL_BATCH) for name, part in texts.items()}
    results: Results = {}
    out = Path(config.out or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    seeds = range(1, config.seeds + 1)
    full = measure(decoder, None, texts)
    with RunLog(out / "run") as log:
        for seed in seeds:
            samples = calibration_samples(stream, config.nsamples, config.context, seed)
            for bits in config.bits:
                for arm in arms(config, bits, seed):
                    label = f"seed {seed}: {bits} bits, {arm.name}"
                    weights = calibrated_weights(decoder, samples, arm.config, label)
                    measured = measure(decoder, weights, texts)
                    results.setdefault((arm.name, bits), []).append(measured)
                    log.log(seed, {"arm": arm.name, "bits": bits, **measured})
    for bits in config.bits:
        fmt = weight_format(arms(config, bits, 0)[0].config, torch.float32)
        rounded = [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)]
        # Rounding does not depend on the calibration seed: one value, repeated for the pairing.
        results["round-to-nearest", bits] = [measure(decoder, rounded, texts)] * config.seeds
    figures = _figures(out / "run", full, results)
    report = Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=sys.argv,
        seeds=list(seeds),
        seconds=time.monotonic() - started,
        rows=_rows(config, full, results),
        claims=_claims(config, results),
        notes=_notes(config, decoder.depth),
        files=["perplexity.png"] if figures else [],
        environment=environment(("transformers", "tokenizers"), str(device)),
    )
    write_report(report, out / "run", figures=figures)
    say(f"report: {out / 'run' / 'report.html'}")
    return report


def _rows(
    config: DemoConfig,
    full: Mapping[str, float],
    results: Results,
) -> list[Row]:
    setting = f"groups of {GROUP_SIZE}, asymmetric; a seed varies samples, order and start"
    rows = [Row("full precision", "float32", {f"ppl {text}": [ppl] for text, ppl in full.items()})]
    for bits in config.bits:
        for name in ARMS:
            runs = results[name, bits]
            metrics = {f"ppl {text}": [run[text] for run in runs] for text in full}
            rows.append(Row(f"W{bits} {name}", setting, metrics))
    return rows


def _claims(config: DemoConfig, results: Results) -> list[Claim]:
    claims = []
    for bits in config.bits:
        for name, rival in CLAIMED:
            ours = results[name, bits]
            for text in ours[0]:
                pairs = zip(results[rival, bits], ours, strict=True)
                cost = " at equal block visits" if rival == "block-wise" else ""
                claims.append(
                    Claim(
                        f"w{bits}-{name}-{rival}-{text}",
                        f"W{bits}: {name} has lower perplexity on {text} than {rival}{cost}",
                        [theirs[text] - own[text] for theirs, own in pairs],
                    )
                )
    return claims


def _notes(config: DemoConfig, depth: int) -> list[str]:
    plans = ((arm, make_plan(arm.config, None, depth)) for arm in arms(config, config.bits[0], 0))
    cost = ", ".join(
        f"{arm.name} {plan.block_visits} visits x {arm.config.epochs} epochs"
        for arm, plan in plans
        if plan.windows
    )
    return [
        f"cost of a calibration: {cost}; compensated rounding trains nothing",
        "intra_order=network: one pass over all windows per intra-layer stage",
        "the model is small and trained for minutes: read the order of the arms, not their distance",
    ]


def _figures(
    folder: Path,
    full: Mapping[str, float],
    results: Results,
) -> list[Path]:
    """Draw perplexity over bits for every arm, one panel per text."""
    if find_spec("matplotlib") is None:
        say("no picture: install sliderquant[plot]")
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(full))
    widths = sorted({bits for _, bits in results})
    for panel, text in zip(panels, full, strict=True):
        for marker, name in zip("so^v", ARMS, strict=True):
            values = [[run[text] for run in results[name, bits]] for bits in widths]
            means = [sum(runs) / len(runs) for runs in values]
            panel.plot(widths, means, marker=marker, label=name)
        panel.axhline(full[text], color="grey", linestyle="--", label="full precision")
        panel.set(xticks=widths, xlabel="bits per weight code", ylabel="perplexity", title=text)
    panels[0].legend()
    path = folder / "perplexity.png"
    figure.savefig(path, dpi=120)
    return [path]
