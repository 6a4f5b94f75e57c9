"""The ``demo`` command: one small trained model, four ways to quantize it, the same data and cost.

The ways are in ``arms``, the text in ``data``, the model in ``models``.
"""

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from effml_common.device import resolve_device
from effml_common.logging import RunLog, say
from effml_common.report import Claim, Report, Row, environment, write_report
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.simulation import (
    weight_format,
)
from sliderquant.adapters.text import calibration_samples, chunks, encode
from sliderquant.commands.inspect import make_plan
from sliderquant.config import DemoConfig
from sliderquant.demo.arms import (
    ARMS,
    CLAIMED,
    EVAL_BATCH,
    EVAL_CHUNKS,
    GROUP_SIZE,
    Texts,
    arms,
    calibrated_weights,
    measure,
)
from sliderquant.demo.data import library_corpus
from sliderquant.demo.models import demo_model
from sliderquant.method.round_to_nearest import rtn_weights

# Perplexity by text, one entry per seed, of every (arm, bits).
Results = dict[tuple[str, int], list[dict[str, float]]]


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
