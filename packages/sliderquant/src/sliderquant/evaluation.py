"""Perplexity as the literature measures it, and the ``eval`` command."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from effml_common.device import resolve_device
from effml_common.errors import InputError, NonFiniteError
from effml_common.logging import Progress, progress
from effml_common.report import Report, Row, environment, write_report
from sliderquant.adapters.files import LoadedModel
from sliderquant.adapters.harness import read_tasks, run_tasks
from sliderquant.adapters.loading import load_any
from sliderquant.adapters.text import encode, read_documents
from sliderquant.config import EvalConfig

LITERATURE_SEQLEN = 2048


def chunks(
    stream: Int[Tensor, " n"], seqlen: int, batch_size: int = 1
) -> Iterable[Int[Tensor, "b t"]]:
    """Cut a token stream into floor(n / seqlen) chunks without overlap, in batches.

    Raises:
        InputError: If the stream does not fill one chunk.
    """
    count = len(stream) // seqlen
    if count == 0:
        raise InputError(
            f"evaluation text has {len(stream)} tokens, fewer than one chunk of {seqlen}; "
            "give more text or lower --seqlen"
        )
    return stream[: count * seqlen].view(count, seqlen).split(batch_size)


@torch.no_grad()
def perplexity(
    logits: Callable[[Int[Tensor, "b t"]], Float[Tensor, "b t v"]],
    batches: Iterable[Int[Tensor, "b t"]],
) -> float:
    """Return exp of the mean over chunks of the mean cross-entropy of tokens 2..t of each chunk.

    Args:
        logits: The model, tokens to logits.
        batches: Chunks of equal length.

    Raises:
        NonFiniteError: If the model's outputs are not finite.
    """
    losses = []
    for tokens in batches:
        predicted = logits(tokens)[:, :-1].float()
        losses += torch.nn.functional.cross_entropy(
            predicted.transpose(1, 2), tokens[:, 1:].to(predicted.device), reduction="none"
        ).mean(dim=1)
    # On the host, because not every device knows float64.
    mean = torch.stack(losses).cpu().double().mean().item()
    if not math.isfinite(mean):
        raise NonFiniteError("the model's cross-entropy is not finite; its weights are damaged")
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def model_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens to the logits of a transformers model, without cache."""
    return lambda tokens: model(input_ids=tokens.to(model.device), use_cache=False).logits


def bar_over(batches: Iterable[Tensor], bar: Progress) -> Iterable[Tensor]:
    """Yield the batches and advance the bar after each."""
    for batch in batches:
        yield batch
        bar.advance()


def default_seqlen(context: int) -> int:
    """Return the literature's chunk length, or the model's limit where that is shorter."""
    return min(LITERATURE_SEQLEN, context)


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
