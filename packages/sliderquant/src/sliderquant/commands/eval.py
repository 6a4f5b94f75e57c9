"""The ``eval`` command: perplexity on text files and lm-eval tasks of a model in any format."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effml_common.device import resolve_device
from effml_common.errors import NonFiniteError, memory_advice
from effml_common.folders import run_folder
from effml_common.logging import Progress, say
from effml_common.report import Report, ReportBuilder, Row
from sliderquant.adapters.files import LoadedModel
from sliderquant.adapters.harness import read_tasks, run_tasks
from sliderquant.adapters.hub import model_directory, model_name
from sliderquant.adapters.input_files import InputFile, InputFiles
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.simulation import model_logits
from sliderquant.adapters.text import (
    begin_note,
    begin_tokens,
    chunks,
    default_seqlen,
    read_tokens,
)
from sliderquant.config import EvalConfig
from sliderquant.method.metrics import perplexity


def advance_over(batches: Iterable[Tensor], bar: Progress) -> Iterable[Tensor]:
    """Yield the batches and advance the bar after each."""
    for batch in batches:
        yield batch
        bar.advance()


def text_perplexity(
    loaded: LoadedModel, file: str | InputFile, seqlen: int | None = None, batch_size: int = 1
) -> float:
    """Return the perplexity of a model in memory on one text file.

    Args:
        loaded: Model and tokenizer.
        file: Path of a text or of records, or what ``InputFiles`` has read.
        seqlen: Tokens per chunk, with those that the tokenizer puts in front; default the
            literature's, or the model's limit.
        batch_size: Chunks per forward pass.

    Raises:
        InputError: If the file cannot be used.
    """
    # What stands in front of every chunk counts as a part of it.
    if isinstance(file, str):
        (file,) = InputFiles().read([file])
    stream = read_tokens([file], loaded.tokenizer, loaded.model)
    begin = begin_tokens(loaded.tokenizer)
    seqlen = seqlen or default_seqlen(loaded.context)
    batches = list(chunks(stream, seqlen, batch_size, begin, name=file.name))

    with Progress(f"perplexity on {file.name}", len(batches)) as bar:
        return perplexity(model_logits(loaded.model), advance_over(batches, bar))


@torch.no_grad()
def check_outputs(model: PreTrainedModel) -> None:
    """Let a model read a few tokens of its vocabulary.

    Raises:
        NonFiniteError: If its logits are not finite.
    """
    logits = model_logits(model)(torch.arange(min(32, model.config.vocab_size))[None])
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model's logits are not finite; check its weights")


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
    with memory_advice("lower --batch-size or --seqlen, or add --dtype stored"):
        return _evaluate(config, loaded)


def _evaluate(config: EvalConfig, loaded: LoadedModel | None) -> Report:
    """Measure and write the report."""
    # Tasks and texts are read first: a fault in a file should not wait for the model.
    builder = ReportBuilder(
        "sliderquant", ("transformers", "tokenizers", "lm-eval", "compressed-tensors")
    )
    run_dir = run_folder(config.out, "eval") / "run"
    device = loaded.model.device if loaded else resolve_device(config.device)
    tasks = read_tasks(config.tasks)
    files = InputFiles().read(config.text, "text")
    if loaded is None:
        loaded = load_any(model_directory(config.model), device, upcast=config.dtype == "float32")

    # Perplexity of each text file.
    seqlen = config.seqlen or default_seqlen(loaded.context)
    notes = [f"computed in {loaded.model.dtype}, stored in {loaded.dtype}"]
    if config.text:
        notes.append(begin_note(begin_tokens(loaded.tokenizer), loaded.tokenizer))
        say(notes[-1])
    metrics = {
        f"perplexity {file.name}": [text_perplexity(loaded, file, seqlen, config.batch_size)]
        for file in files
    }

    # Scores of each task, with their standard errors as notes; with NaN a harness would count on.
    if tasks:
        check_outputs(loaded.model)
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

    row = Row(model_name(config.model), f"{seqlen} tokens per chunk", metrics)
    return builder.write(run_dir, [row], device=str(device), notes=notes)
