"""The ``demo`` command: one small trained model, five ways to quantize it, the same data and cost.

The ways are in ``arms``, the text in ``data``, the model in ``models``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from effml_common.folders import run_folder
from effml_common.logging import RunLog, say
from effml_common.report import Claim, Report, ReportBuilder, Row
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.processes import device_with_float64
from sliderquant.adapters.simulation import (
    weight_format,
)
from sliderquant.adapters.text import begin_tokens, calibration_samples, chunks, encode
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


@dataclass(frozen=True, kw_only=True)
class Material:
    """What every arm works on.

    Attributes:
        decoder: The trained model.
        stream: Token ids to draw calibration samples from.
        begin: Token ids in front of every sample and chunk.
        texts: Held-out chunks to measure on, in batches, by name.
    """

    decoder: TransformersDecoder
    stream: Tensor
    begin: Sequence[int]
    texts: Texts


def demo(config: DemoConfig) -> Report:
    """Train the small model once, quantize it in every arm and seed, and write the comparison.

    Returns:
        The report: a row per bit width and arm, one value per seed; claims on paired gaps.

    Raises:
        NonFiniteError: If the training or a calibration diverges.
    """
    builder = ReportBuilder("sliderquant", ("transformers", "tokenizers"))
    folder = run_folder(config.out, "demo") / "run"
    device = device_with_float64(config.device)
    say("estimate: 9 min to train the model on the first run, then 3 min per seed; under 2 GiB")
    # Matrices this small gain nothing from a second thread, and beside any other busy process the
    # threads wait for one another: 8 times slower was measured.
    torch.set_num_threads(1)

    # The same model, text and samples for every arm.
    material = _prepare(config, device)
    full = measure(material.decoder, None, material.texts)
    results = _run_arms(config, material, folder) | _round_to_nearest(config, material)

    return builder.write(
        folder,
        _rows(config, full, results),
        device=str(device),
        seeds=list(_seeds(config)),
        claims=_claims(config, results),
        notes=_notes(config, material.decoder.depth),
        figures=_draw(folder, full, results),
    )


def _seeds(config: DemoConfig) -> range:
    return range(1, config.seeds + 1)


def _prepare(config: DemoConfig, device: torch.device) -> Material:
    """Train or find the model, and encode the texts."""
    corpus = library_corpus()
    loaded = load_model(demo_model(config, corpus, device), device)
    begin = begin_tokens(loaded.tokenizer)
    texts: dict[str, Sequence[Tensor]] = {}
    for name, text in (("code", corpus.code), ("prose", corpus.prose)):
        pieces = chunks(encode([text], loaded.tokenizer), config.context, begin=begin)
        texts[name] = torch.cat(list(pieces)[:EVAL_CHUNKS]).split(EVAL_BATCH)
    return Material(
        decoder=TransformersDecoder(loaded.model),
        stream=encode(corpus.train, loaded.tokenizer),
        begin=begin,
        texts=texts,
    )


def _run_arms(config: DemoConfig, material: Material, folder: Path) -> Results:
    """Calibrate and measure every arm, for every seed and width."""
    results: Results = {}
    with RunLog(folder) as log:
        for seed in _seeds(config):
            samples = calibration_samples(
                material.stream, config.nsamples, config.context, seed, material.begin
            )
            for bits in config.bits:
                for arm in arms(config, bits, seed):
                    label = f"seed {seed}: {bits} bits, {arm.name}"
                    weights = calibrated_weights(material.decoder, samples, arm.config, label)
                    measured = measure(material.decoder, weights, material.texts)
                    results.setdefault((arm.name, bits), []).append(measured)
                    log.log(seed, {"arm": arm.name, "bits": bits, **measured})
    return results


def _round_to_nearest(config: DemoConfig, material: Material) -> Results:
    """Measure the baseline that uses no calibration: one value, repeated for the pairing."""
    decoder = material.decoder
    results: Results = {}
    for bits in config.bits:
        fmt = weight_format(arms(config, bits, 0)[0].config, torch.float32)
        weights = [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)]
        measured = measure(decoder, weights, material.texts)
        results["round-to-nearest", bits] = [measured] * config.seeds
    return results


def _rows(config: DemoConfig, full: Mapping[str, float], results: Results) -> list[Row]:
    """Return full precision, then every arm at every width."""
    setting = f"groups of {GROUP_SIZE}, asymmetric; a seed varies samples, order and start"
    rows = [Row("full precision", "float32", {f"ppl {text}": [ppl] for text, ppl in full.items()})]
    for bits in config.bits:
        for name in ARMS:
            runs = results[name, bits]
            metrics = {f"ppl {text}": [run[text] for run in runs] for text in full}
            rows.append(Row(f"W{bits} {name}", setting, metrics))
    return rows


def _claims(config: DemoConfig, results: Results) -> list[Claim]:
    """Return the paired gaps of every arm to those that it should be better than."""
    claims = []
    for bits in config.bits:
        for name, other in CLAIMED:
            ours = results[name, bits]
            for text in ours[0]:
                pairs = zip(results[other, bits], ours, strict=True)
                cost = " at equal block visits" if other == "block-wise" else ""
                claims.append(
                    Claim(
                        f"w{bits}-{name}-{other}-{text}",
                        f"W{bits}: {name} has lower perplexity on {text} than {other}{cost}",
                        [theirs[text] - own[text] for theirs, own in pairs],
                    )
                )
    return claims


def _notes(config: DemoConfig, depth: int) -> list[str]:
    plans = ((arm, make_plan(arm.config, None, depth)) for arm in arms(config, config.bits[0], 0))
    cost = ", ".join(
        f"{arm.name} {plan.block_visits} visits x {arm.config.window_epochs} epochs"
        for arm, plan in plans
        if plan.windows
    )
    return [
        f"cost of a calibration: {cost}; compensated rounding trains nothing",
        "intra_order=network: one pass over all windows per intra-layer stage",
        "the model is small and trained for minutes: read the order of the arms, not their distance",
    ]


def _draw(folder: Path, full: Mapping[str, float], results: Results) -> list[Path]:
    """Draw perplexity over bits for every arm, one panel per text."""
    if find_spec("matplotlib") is None:
        say("no picture: install sliderquant[plot]")
        return []
    from matplotlib.figure import Figure

    # One panel for each text, one line for each arm.
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(full))
    widths = sorted({bits for _, bits in results})
    for panel, text in zip(panels, full, strict=True):
        for marker, name in zip("so^vD", ARMS, strict=True):
            values = [[run[text] for run in results[name, bits]] for bits in widths]
            means = [sum(runs) / len(runs) for runs in values]
            panel.plot(widths, means, marker=marker, label=name)
        panel.axhline(full[text], color="grey", linestyle="--", label="full precision")
        panel.set(xticks=widths, xlabel="bits per weight code", ylabel="perplexity", title=text)
    panels[0].legend()
    path = folder / "perplexity.png"
    figure.savefig(path, dpi=120)
    return [path]
