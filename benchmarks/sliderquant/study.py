"""Window schedules and intra-layer stages against block-wise and rounding, at equal block visits.

Run from the workspace root; it trains its small model once (``--layers 12`` takes half an hour):

    uv run python -m benchmarks.sliderquant.study --layers 12 --group-size 32
    uv run python -m benchmarks.sliderquant.study --text development --rates 5e-4 1.5e-3 5e-3 1.5e-2

Every arm gets the same samples, the same learning rates and as many epochs as make its block visits
equal to SliderQuant's. Results go to ``--out`` as JSON, one object per run, and as a table.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.script import run_script
from effml_common.errors import InputError
from effml_common.files import atomic_write
from effml_common.parsing import setting
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.simulation import weight_format
from sliderquant.adapters.text import begin_tokens, calibration_samples, chunks, encode
from sliderquant.commands.inspect import make_plan
from sliderquant.config import DemoModelConfig, SliderConfig
from sliderquant.demo.arms import calibrated_weights, measure
from sliderquant.demo.data import Corpus, library_corpus
from sliderquant.demo.models import demo_model
from sliderquant.method.round_to_nearest import rtn_weights

ARMS: dict[str, dict[str, Any]] = {
    "block-wise": {"schedule": "block", "gamma": 1.0},
    "fixed windows of 2": {"schedule": "fixed", "gamma": 1.0},
    "sliding windows": {"gamma": 1.0},
    "block-wise + intra": {"schedule": "block", "gamma": 0.5},
    "SliderQuant": {"gamma": 0.5},
    "SliderQuant, window order": {"gamma": 0.5, "intra_order": "window"},
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(DemoModelConfig):
    """Quantize the demo's model in every arm at every learning rate."""

    wbits: int = setting(2, "bits per weight")
    group_size: int | None = setting(64, "columns per scale; none for one per row")
    rates: tuple[float, ...] = setting((5e-4, 1.5e-3, 5e-3), "learning rates of the correction")
    lwc_factor: float = setting(20.0, "learning rate of the clipping over that of the correction")
    nsamples: int = setting(64, "calibration samples")
    batch_size: int = setting(8, "samples per update")
    epochs: int = setting(8, "epochs of SliderQuant; other arms get as many as cost the same")
    seeds: tuple[int, ...] = setting((0,), "calibration seeds")
    arms: tuple[str, ...] = setting(tuple(ARMS), "arms to run")
    text: Literal["development", "held-out"] = setting("held-out", "text to measure on")
    eval_tokens: int = setting(51_200, "tokens to measure on, per text")
    threads: int = setting(1, "CPU threads")
    out: str = setting("runs/sliderquant-study.json", "file to write")


def arm_config(config: StudyConfig, arm: str, rate: float, seed: int) -> SliderConfig:
    """Return the settings of one run, its epochs scaled to SliderQuant's block visits."""
    # What all arms share.
    common = {
        "wbits": config.wbits,
        "group_size": config.group_size,
        "sym": False,
        "batch_size": config.batch_size,
        "nsamples": config.nsamples,
        "seqlen": config.context,
        "seed": seed,
        "method": "slider",
        "lr_lora": rate,
        "lr_lwc": rate * config.lwc_factor,
    }

    # As many epochs as cost what SliderQuant costs, in whole intra-layer stages.
    budget = make_plan(SliderConfig(**common), None, config.layers).block_visits * config.epochs
    visits = make_plan(SliderConfig(**common, **ARMS[arm]), None, config.layers).block_visits
    stages = round(1 / ARMS[arm]["gamma"])
    epochs = max(stages, stages * round(budget / visits / stages))
    return SliderConfig(**common, **ARMS[arm], epochs=epochs)


def study(config: StudyConfig) -> list[dict[str, Any]]:
    """Run every arm, rate and seed; write the results after each run."""
    unknown = set(config.arms) - set(ARMS)
    if unknown:
        raise InputError(f"no arm {sorted(unknown)[0]!r}; use some of {', '.join(ARMS)}")
    torch.set_num_threads(config.threads)

    # The model, text to calibrate on and text to measure on.
    corpus = library_corpus()
    loaded = load_model(demo_model(config, corpus))
    decoder = TransformersDecoder(loaded.model)
    stream = encode(corpus.train, loaded.tokenizer)
    begin = begin_tokens(loaded.tokenizer)
    batches = evaluation_batches(config, corpus, loaded.tokenizer)

    # What every arm stands beside.
    fmt = weight_format(arm_config(config, "SliderQuant", 0.0, 0), torch.float32)
    nearest = [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)]
    results: list[dict[str, Any]] = [
        {"arm": "full precision", "perplexity": measure(decoder, None, batches)},
        {"arm": "round-to-nearest", "perplexity": measure(decoder, nearest, batches)},
    ]

    # Every run is on disk as soon as it is measured.
    for seed in config.seeds:
        samples = calibration_samples(stream, config.nsamples, config.context, seed, begin)
        for rate in config.rates:
            for arm in config.arms:
                results.append(run_arm(config, decoder, samples, batches, (arm, rate, seed)))
                record = {"command": sys.argv[1:], "results": results}
                atomic_write(Path(config.out), json.dumps(record, indent=1) + "\n")
    return results


def evaluation_batches(
    config: StudyConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Tensor]]:
    """Return chunks of the texts to measure on, in batches, by the text's name."""
    held_out = {"code": corpus.code, "prose": corpus.prose}
    texts = held_out if config.text == "held-out" else {"development": corpus.development}
    streams = {name: encode([text], tokenizer) for name, text in texts.items()}
    begin = begin_tokens(tokenizer)
    return {
        name: list(chunks(stream[: config.eval_tokens], config.context, 32, begin))
        for name, stream in streams.items()
    }


def run_arm(
    config: StudyConfig,
    decoder: TransformersDecoder,
    samples: Tensor,
    batches: dict[str, list[Tensor]],
    place: tuple[str, float, int],
) -> dict[str, Any]:
    """Calibrate and measure one arm at one rate with one seed."""
    arm, rate, seed = place
    settings = arm_config(config, arm, rate, seed)
    begin = time.monotonic()
    weights = calibrated_weights(decoder, samples, settings, f"{arm}, rate {rate:g}")
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "visits": make_plan(settings, None, decoder.depth).block_visits * settings.epochs,
        "seconds": round(time.monotonic() - begin, 1),
        "perplexity": measure(decoder, weights, batches),
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    table = Table(title="perplexity at equal block visits")
    texts = list(results[0]["perplexity"])
    for column in ("arm", "rate", "seed", "visits x epochs", *texts):
        table.add_column(column)
    for row in results:
        settings = (str(row.get(key, "")) for key in ("rate", "seed", "visits"))
        table.add_row(row["arm"], *settings, *(f"{row['perplexity'][t]:.3f}" for t in texts))
    Console(width=120).print(table)


def run(config: StudyConfig) -> None:
    """Run the study and print its table."""
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    show(study(config))


if __name__ == "__main__":
    raise SystemExit(run_script(StudyConfig, "python -m benchmarks.sliderquant.study", run))
