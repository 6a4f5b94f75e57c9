"""Text files to tokens: calibration samples and evaluation streams."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters.files import quiet_transformers

LITERATURE_SEQLEN = 2048  # tokens per chunk of evaluation text
SCARCE_TOKENS = 16_384  # below this, calibration tends to fit the samples rather than the model


def read_documents(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Read text files, and JSON lines with ``text`` or chat ``messages``.

    Args:
        paths: Files; those ending in ``.jsonl`` are read line by line, others are one document.
        tokenizer: Its chat template turns ``messages`` into text.

    Raises:
        InputError: If a file is missing, not UTF-8, empty, or a line is of neither form.
    """
    documents = []
    for path in map(Path, paths):
        # Any file is text in UTF-8.
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None

        # Each line of a .jsonl is a document; another file is one.
        if path.suffix == ".jsonl":
            lines = [line for line in text.splitlines() if line.strip()]
            documents += [
                _record_text(line, f"{path} line {number}", tokenizer)
                for number, line in enumerate(lines, start=1)
            ]
        else:
            documents.append(text)

    if not any(document.strip() for document in documents):
        raise InputError(f"{', '.join(map(str, paths))}: no text; give files that hold some")
    return documents


def _record_text(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of one JSON line; ``where`` names it in messages."""
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{where} is no JSON; write one object per line") from None

    # Plain text as it is, a chat as the model's template writes it.
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise InputError(f"{where} is a chat, the model has no chat template; use 'text' lines")
        try:
            return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
        except Exception as error:  # a template is a program: any error may come
            raise InputError(f"{where} does not fit the chat template ({error}); fix it") from None
    raise InputError(f"{where} has neither 'text' nor 'messages'; add one of them")


def encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " n"]:
    """Join documents by blank lines and encode them as one text, as for published perplexities."""
    with quiet_transformers():  # the text is longer than the model's limit on purpose
        ids = tokenizer("\n\n".join(documents), return_tensors="pt")["input_ids"]
    return ids[0]


def read_tokens(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " n"]:
    """Read text files and encode them as one stream.

    Raises:
        InputError: If a file cannot be used, see ``read_documents``.
    """
    return encode(read_documents(paths, tokenizer), tokenizer)


def calibration_samples(
    stream: Int[Tensor, " tokens"], nsamples: int, seqlen: int, seed: int
) -> Int[Tensor, "n t"]:
    """Cut random samples out of a token stream.

    Args:
        stream: Token ids.
        nsamples: Number of samples; they may overlap.
        seqlen: Tokens per sample.
        seed: Of the places where samples begin.

    Raises:
        InputError: If the stream is shorter than one sample.
    """
    if len(stream) < seqlen:
        raise InputError(
            f"calibration text has {len(stream)} tokens, one sample needs {seqlen}; "
            "give more text or lower --seqlen"
        )
    if len(stream) < nsamples * seqlen:
        warn(
            f"calibration text has {len(stream)} tokens for {nsamples} samples of {seqlen}: "
            "samples overlap"
        )
    if nsamples * seqlen < SCARCE_TOKENS:
        warn(f"only {nsamples * seqlen} calibration tokens; {SCARCE_TOKENS} or more are better")

    # Places are drawn uniformly; the last one leaves room for a whole sample.
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - seqlen + 1, (nsamples, 1), generator=generator)
    return stream[starts + torch.arange(seqlen)]


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


def default_seqlen(context: int) -> int:
    """Return the literature's chunk length, or the model's limit where that is shorter."""
    return min(LITERATURE_SEQLEN, context)
