"""The ``eval`` command: perplexity on text files and lm-eval tasks of a model in any format."""

import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from effml_common.device import resolve_device
from effml_common.logging import Progress, progress
from effml_common.report import Report, Row, environment, write_report
from sliderquant.adapters.files import LoadedModel
from sliderquant.adapters.harness import read_tasks, run_tasks
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.simulation import model_logits
from sliderquant.adapters.text import chunks, default_seqlen, encode, read_documents
from sliderquant.config import EvalConfig
from sliderquant.method.metrics import perplexity


def bar_over(batches: Iterable[Tensor], bar: Progress) -> Iterable[Tensor]:
    """Yield the batches and advance the bar after each."""
    for batch in batches:
        yield batch
        bar.advance()


def text_perplexity(
    loaded: LoadedModel, path: str, seqlen: int | None = None, batch_size: int = 1
) -> float:
    """Return the perplexity of a model in memory on one text file.

    Args:
        loaded: Model and tokenizer.
        path: Text, or JSON lines.
        seqlen: Tokens per chunk; default the literature's, or the model's limit.
        batch_size: Chunks per forward pass.

    Raises:
        InputError: If the file cannot be used.
    """
    stream = encode(read_documents([path], loaded.tokenizer), loaded.tokenizer)
    batches = list(chunks(stream, seqlen or default_seqlen(loaded.context), batch_size))
    with progress(f"perplexity on {Path(path).name}", len(batches)) as bar:
        return perplexity(model_logits(loaded.model), bar_over(batches, bar))


def evaluate(config: EvalConfig, loaded: LoadedModel | None = None) -> Report:
    """Measure perplexities and lm-eval tasks of a model and write the report.

    Args:
        config: What to measure.
        loaded: A model in memory, instead of the directory ``config.model``.

    Returns:
        The report: one row, one metric per file and per task metric.

    Raises:
        InputError: If the model, a file or the device cannot be used.
    """
    started = time.monotonic()
    device = loaded.model.device if loaded else resolve_device(config.device)
    tasks = read_tasks(config.tasks)
    loaded = loaded or load_any(config.model, device, upcast=config.dtype == "float32")
    seqlen = config.seqlen or default_seqlen(loaded.context)
    metrics = {
        f"perplexity {Path(path).name}": [text_perplexity(loaded, path, seqlen, config.batch_size)]
        for path in config.text
    }
    notes = [f"computed in {loaded.model.dtype}, stored in {loaded.dtype}"]
    if tasks:
        scores = run_tasks(
            loaded.model,
            loaded.tokenizer,
            tasks,
            batch_size=config.batch_size,
            max_length=seqlen,
            limit=config.limit,
        )
        for task in scores:
            metrics |= {f"{task.name} {name}": [value] for name, value in task.metrics.items()}
            notes += [
                f"{task.name} {name}: standard error {value:.4f} over {task.samples} documents"
                for name, value in task.stderrs.items()
            ]
    report = Report(
        package="sliderquant",
        version=version("sliderquant"),
        command=sys.argv,
        seeds=[],
        seconds=time.monotonic() - started,
        rows=[Row(Path(config.model).name, f"{seqlen} tokens per chunk", metrics)],
        notes=notes,
        environment=environment(
            ("transformers", "tokenizers", "lm-eval", "compressed-tensors"), str(device)
        ),
    )
    out = Path(config.out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    (out / "run").mkdir(parents=True, exist_ok=True)
    write_report(report, out / "run")
    return report
