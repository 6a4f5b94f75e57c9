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
#     "gguf==0.19.0",
# ]
# [tool.uv.sources]
# sliderquant = { path = "../../packages/sliderquant", editable = true }
# effml-common = { path = "../../packages/effml-common", editable = true }
# ///
"""sliderquant on a real language model, Gemma 3 270M, against what a user would install instead.

GPTQ and AWQ of llm-compressor, AutoRound, HQQ and rounding to nearest get the same calibration tokens,
grids and texts, in the environment described above:

    uv run benchmarks/sliderquant/gemma.py --plan
    uv run benchmarks/sliderquant/gemma.py
    uv run benchmarks/sliderquant/gemma.py --only gptq compensated --setting W3g128 --seeds 0
    uv run benchmarks/sliderquant/gemma.py --model llama
    uv run benchmarks/sliderquant/gemma.py --report

A cell is one model, setting, arm and calibration seed. It runs in a process of its own and leaves one
JSON file; what is there is not run again, except what failed. A file's name holds a hash of all that
shapes its result: settings, model, text and library version, and for sliderquant's own arms also the
code of its ``method`` and ``kernels``; of what leads to them (``adapters``) it holds nothing. Model and
text are fetched once, see ``gemma_data``.
"""

import sys
from pathlib import Path

# Run as a script, which uv needs: what is ours is found from the root, and the modules of this folder
# (``cuda``) do not hide those of libraries.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console
from rich.table import Table

from benchmarks.sliderquant.cell_processes import call_apart, command, run_cell
from benchmarks.sliderquant.gemma_cells import (
    GemmaConfig,
    design,
    expected_seconds,
    known_results,
    path_of,
    result_of,
)
from benchmarks.sliderquant.gemma_measure import subject_of, work
from benchmarks.sliderquant.gemma_report import write
from effml_common.errors import InputError
from effml_common.logging import say

PROG = "uv run benchmarks/sliderquant/gemma.py"
EXAMPLES = (
    f"{PROG} --plan",
    f"{PROG} --only compensated --setting W2g64 --seeds 0 --own channel_scale=on",
)


def run(config: GemmaConfig) -> None:
    """Run every cell that is missing, one process after the other."""
    logs = Path(config.logs)
    if logs.is_file():
        raise InputError(f"{logs} is a file; give a folder")
    logs.mkdir(parents=True, exist_ok=True)
    if call_apart(subject_of, logs / f"{config.model}.log", config.model):
        log = logs / f"{config.model}.log"
        raise InputError(f"{config.model} could not be made; see the end of {log}")

    cells = design(config)
    for number, cell in enumerate(cells, start=1):
        path = path_of(config, cell)
        if result_of(config, cell) is not None:
            continue
        words = f"{number}/{len(cells)} {cell.model} {cell.setting} {cell.label}, seed {cell.seed}"

        expected = expected_seconds(cell, known_results(Path(config.cells)))
        say(f"{words}: about {expected:.0f} CPU seconds")
        run_cell(work, config, cell, path, logs / f"{path.stem}.log", words)


def plan(config: GemmaConfig) -> Table:
    """Return a table of the cells, what is there and the CPU seconds that the others will take."""
    known, total = known_results(Path(config.cells)), 0.0
    table = Table("cell", "seed", "state", "CPU seconds")
    for cell in design(config):
        result = result_of(config, cell)
        expected = expected_seconds(cell, known)
        total += expected if result is None else 0.0
        seconds = expected if result is None else result["cell_cpu_seconds"]
        state = "missing" if result is None else "there"
        name = f"{cell.model} {cell.setting} {cell.label}"
        table.add_row(name, str(cell.seed), state, f"{seconds:.0f}")
    table.add_row("all that is missing", "", "", f"{total:.0f} ({total / 3600:.1f} h)")
    return table


def study(config: GemmaConfig, words: list[str]) -> None:
    """Plan, or run and write the report."""
    if config.plan:
        Console().print(plan(config))
        return
    if not config.report:
        run(config)
    table = write(config, [PROG, *words])
    if table is not None:
        print(table)


if __name__ == "__main__":
    raise SystemExit(command(GemmaConfig, PROG, EXAMPLES, study))
