# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.14.0",
#     "transformers==5.17.0",
#     "compressed-tensors==0.19.0",
#     "llmcompressor==0.14.0.1",
#     "auto-round==0.15.1",
#     "hqq==0.2.8.post1",
#     "torchao==0.18.0",
#     "sliderquant[plot]",
#     "effml-common",
# ]
# [tool.uv.sources]
# sliderquant = { path = "../../packages/sliderquant", editable = true }
# effml-common = { path = "../../packages/effml-common", editable = true }
# ///
"""sliderquant against GPTQ and AWQ of llm-compressor, AutoRound, HQQ, torchao and rounding to nearest.

All in one run, on the same models, calibration tokens, grids and texts. The peers need an older torch
than the workspace, so this script has an environment of its own, described above:

    uv run benchmarks/sliderquant/peers.py
    uv run benchmarks/sliderquant/peers.py --ablation
    uv run benchmarks/sliderquant/peers.py --sensitivity
    uv run benchmarks/sliderquant/peers.py --report

A cell is one model, setting, method and seed. It runs in a process of its own, so that libraries do
not meet and peak memory is its own, and leaves one JSON file in ``--cells``: what is there already is
not run again, except what failed. The name of a file holds a hash of all settings that shape its
result. Nothing is downloaded except the libraries.
"""

import importlib
import itertools
import resource
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Run as a script, which uv needs: what is ours is found from the root, and the modules of this folder
# (``cuda``) do not hide those of libraries.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.sliderquant.cell_processes import (
    call_apart,
    command,
    result_or_error,
    run_cell,
    write_result,
)
from benchmarks.sliderquant.peers_cells import (
    GRIDS,
    PAIRS,
    Cell,
    PeersConfig,
    ablation_cells,
    count_of,
    full_cell,
    material_path,
    path_of,
    peer_cells,
    result_of,
    sensitivity_cells,
)
from benchmarks.sliderquant.peers_methods import (
    LIBRARIES,
    METHODS,
    Task,
    check_rounded,
    columns_of,
    epochs_in,
)
from benchmarks.sliderquant.peers_models import Material, prepare, read_material
from benchmarks.sliderquant.peers_report import write
from effml_common.errors import ConfigError, InputError
from effml_common.logging import Progress, say
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.files import load_model
from sliderquant.adapters.simulation import model_logits
from sliderquant.adapters.text import calibration_samples, chunks
from sliderquant.commands.sensitivity import measure
from sliderquant.method.metrics import perplexity
from sliderquant.method.quantizer import WeightFormat

PROG = "uv run benchmarks/sliderquant/peers.py"
EXAMPLES = (
    f"{PROG} --models llama --settings W2g64 --seeds 1",
    f"{PROG} --text development --methods slider-visits --lr-lora 5e-3",
)
EVAL_BATCH = 32
# What all cells need, imported once; a library of a peer is imported in its own cell.
PRELOAD = ("benchmarks.sliderquant.peers_report", "benchmarks.sliderquant.peers_models")
WIDTH = 140  # of the table, in characters


def run(config: PeersConfig) -> None:
    """Run every cell that is missing, one process after the other."""
    # What is asked for.
    cells = peer_cells(config)
    if config.ablation:
        cells = ablation_cells(config)
    elif config.sensitivity:
        cells = sensitivity_cells(config)

    # Models and tokens that all cells share.
    families = dict.fromkeys(family for family, _ in config.pairs)
    for family in families:
        path = material_path(config, family)
        log = path.with_suffix(".log")
        if read_material(path) is None:
            say(f"{family}: training and encoding, once; progress is in {log}")
            if call_apart(prepare, log, family, config, path, preload=PRELOAD):
                raise InputError(f"{family} could not be made; see the end of {log}")

    with Progress("cells", len(families) + count_of(config)) as bar:
        for cell in itertools.chain(map(full_cell, families), cells):
            run_missing(config, cell)
            bar.advance()


def run_missing(config: PeersConfig, cell: Cell) -> None:
    """Run a cell in its own process, unless its result is there."""
    path = path_of(config, cell)
    kept = result_of(config, cell)
    if kept is not None and "error" not in kept:
        return
    words = f"{cell.family} {cell.setting} {cell.label}, seed {cell.seed}"
    run_cell(work, config, cell, path, path.with_suffix(".log"), words, PRELOAD)


def work(config: PeersConfig, cell: Cell, path: Path) -> None:
    """Run a cell in this process and write its result, or its error."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(cell.seed)
    measured = round_blocks if cell.method == "sensitivity" else quantize_cell
    material = read_material(material_path(config, cell.family))
    assert material is not None  # made before the first cell
    write_result(path, cell, result_or_error(lambda: measured(config, cell, material)))


def texts(config: PeersConfig, material: Material) -> dict[str, list[Tensor]]:
    """Return what to measure perplexity on, in batches of chunks [b, context], by name."""
    names = ("code", "prose") if config.text == "held-out" else ("development",)
    wanted = {name: material.tokens[name][: config.eval_tokens] for name in names}
    return {
        name: list(chunks(tokens, config.context, EVAL_BATCH, material.begin))
        for name, tokens in wanted.items()
    }


def quantize_cell(config: PeersConfig, cell: Cell, material: Material) -> dict[str, Any]:
    """Quantize and measure one model."""
    # The model as it is, or as a method leaves it.
    loaded = load_model(material.folder)
    model, facts = loaded.model, {}
    if cell.method != "full":
        task = Task(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            samples=calibration_samples(
                material.tokens["train"],
                config.nsamples,
                config.context,
                cell.seed,
                material.begin,
            ),
            grid=GRIDS[cell.setting],
            options=cell.options,
        )
        model, facts = run_method(task, cell.method)

    logits = model_logits(model)
    measured = texts(config, material)
    return {"ppl": {name: perplexity(logits, t) for name, t in measured.items()}, **facts}


def run_method(task: Task, method: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Quantize, and return the model with its seconds, memory (MiB), library and settings."""
    # Imports and the choice of epochs are no part of the time.
    columns = columns_of(task.model)
    distribution, module = LIBRARIES[method]
    importlib.import_module(module)
    if "seconds" in task.options:
        task.options["config"]["epochs"] = epochs_in(task, task.options["seconds"])

    # Wall time, CPU time and peak memory of the quantization alone.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter(), time.process_time()
    model, settings = METHODS[method](task)
    end = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    check_rounded(model, columns, task.grid)
    return model, {
        "seconds": end[0] - begin[0],
        "cpu_seconds": end[1] - begin[1],
        "peak_mib": peak / 1024,
        "added_mib": (peak - before) / 1024,
        "library": f"{distribution} {version(distribution)}",
        "how": settings,
    }


def round_blocks(config: PeersConfig, cell: Cell, material: Material) -> dict[str, Any]:
    """Round one block at a time to nearest, the others not."""
    decoder = TransformersDecoder(load_model(material.folder).model)
    grid = GRIDS[cell.setting]
    fmt = WeightFormat(bits=grid.bits, group_size=grid.group, sym=False, dtype=torch.float32)
    variants = [(f"block {b}", b, decoder.layout(b).linears) for b in range(decoder.depth)]
    text, batches = next(iter(texts(config, material).items()))
    measured = measure(decoder, torch.cat(batches), fmt, variants)
    return {"damage": [asdict(each) for each in measured], "text": text}


def study(config: PeersConfig, words: list[str]) -> None:
    """Run, unless only the report is asked for, and write it."""
    if not config.pairs:
        pairs = ", ".join(" ".join(pair) for pair in PAIRS)
        raise ConfigError(f"no such model at such a setting; there are {pairs}")
    if not config.report:
        run(config)
    report = write(config, [PROG, *words])
    if report is not None:
        Console(width=WIDTH).print(report)


if __name__ == "__main__":
    raise SystemExit(command(PeersConfig, PROG, EXAMPLES, study))
