"""Text files to tokens: calibration samples, and chunks to measure on.

All documents are one stream of tokens. A model that was trained with a BOS (begin of sequence) token
expects one in front of whatever it reads, so every sample and every chunk that is cut from the stream
gets the tokens that the model's own tokenizer puts in front of a text.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters.files import quiet_transformers
from sliderquant.adapters.input_files import InputFile, InputFiles, Record
from sliderquant.adapters.reasons import reason_of
from sliderquant.method.sampling import HELD_OUT_SHARE, held_out_samples

LITERATURE_SEQLEN = 2048  # tokens per chunk of evaluation text
SCARCE_TOKENS = 16_384  # below this, calibration tends to fit the samples rather than the model
AMPLE_TEXT = 10  # times what all samples hold: from there on, few of them overlap
STRETCH = (
    4  # samples that follow each other in a stretch of the text kept apart, where there is room
)
_PROBE = "a"  # a text that any tokenizer knows


def read_documents(
    files: Sequence[str] | Sequence[InputFile], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the texts of files; chat ``messages`` are written as the chat template does it.

    Args:
        files: Paths, see ``InputFiles``, or what it has read.
        tokenizer: Its chat template turns ``messages`` into text.

    Raises:
        InputError: If a file or a record cannot be used, or all are empty.
    """
    paths = [file for file in files if isinstance(file, str)]
    read = [file for file in files if isinstance(file, InputFile)] or InputFiles().read(paths)
    documents = [_record_text(record, tokenizer) for file in read for record in file.records]
    if not any(document.strip() for document in documents):
        names = ", ".join(file.path for file in read)
        raise InputError(f"{names}: no text; give files that hold some")
    return documents


def _record_text(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of one record."""
    # Plain text as it is, a chat as the model's template writes it.
    if isinstance(record.value.get("text"), str):
        text = record.value["text"]
    elif not tokenizer.chat_template:
        raise InputError(
            f"{record.place}: a chat, and the model has no chat template; use records with 'text'"
        )
    else:
        try:
            text = str(tokenizer.apply_chat_template(record.value["messages"], tokenize=False))
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: any error may come
            raise InputError(
                f"{record.place}: the chat template refuses it ({reason_of(error)}); mend the chat"
            ) from None

    # JSON can spell half of a character, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(
            f"{record.place}: {half} is half of a character; remove it or write its other half"
        ) from None
    return text


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer itself puts in front of a text, such as BOS; often none.

    What it puts behind a text, such as EOS, is no part of them.

    Raises:
        InputError: If the special tokens change the text's own tokens.
    """
    own: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer(_PROBE)["input_ids"]
    for front in range(len(full) - len(own) + 1):
        if full[front : front + len(own)] == own:
            return full[:front]
    raise InputError(
        f"the tokenizer encodes {_PROBE!r} as {own} without and {full} with special tokens; "
        "use one that puts them around the text"
    )


def begin_note(begin: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Say in a line what every sample and chunk starts with."""
    if not begin:
        return "the tokenizer puts nothing in front of a text: samples and chunks are plain pieces"
    front = tokenizer.decode(list(begin))
    return f"every sample and chunk starts with {front}, as the tokenizer puts it"


def encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " n"]:
    """Join documents by blank lines and encode them as one text, without special tokens.

    Special tokens that a chat template writes as text become their ids, where they stand.

    Raises:
        InputError: If the tokenizer cannot encode the text.
    """
    text = "\n\n".join(documents)
    try:
        with quiet_transformers():  # the text is longer than the model's limit on purpose
            encoding = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raise plain exceptions, as for a missing <unk>
        raise InputError(
            f"the tokenizer cannot encode the text ({reason_of(error)}); use the one of the model"
        ) from error
    return encoding["input_ids"][0]


def read_tokens(
    files: Sequence[str] | Sequence[InputFile],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> Int[Tensor, " n"]:
    """Return files as one stream of tokens that the model knows, without special tokens.

    Args:
        files: Paths, or what ``InputFiles`` has read.
        tokenizer: Of the model.
        model: Its embedding says how many tokens it knows; the weights may be empty.

    Raises:
        InputError: If a file cannot be used, or a token is beyond the embedding.
    """
    stream = encode(read_documents(files, tokenizer), tokenizer)
    largest = [int(stream.max())] if len(stream) else []
    check_tokens(begin_tokens(tokenizer) + largest, model)
    return stream


def check_tokens(tokens: Iterable[int], model: PreTrainedModel) -> None:
    """Refuse tokens for which the model's embedding has no row.

    Raises:
        InputError: If there is one.
    """
    rows, largest = _embedding_rows(model), max(tokens, default=0)
    if largest >= rows:
        raise InputError(
            f"the tokenizer makes token {largest}, the model knows {rows}; "
            "use the tokenizer that belongs to it"
        )


def _embedding_rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def calibration_samples(
    stream: Int[Tensor, " tokens"],
    nsamples: int,
    seqlen: int,
    seed: int,
    begin: Sequence[int] = (),
) -> Int[Tensor, "n t"]:
    """Cut random samples out of a token stream, each with the same tokens in front.

    The last ones are those that compensated rounding holds out (``held_out_samples``). Where samples of
    a short text would overlap often, stretches of it are kept apart for them.

    Args:
        stream: Token ids.
        nsamples: Number of samples; they may overlap.
        seqlen: Tokens per sample, those in front included.
        seed: Of the places where samples begin.
        begin: What stands in front of every sample, see ``begin_tokens``.

    Raises:
        InputError: If the stream is shorter than one sample.
    """
    room = _room(seqlen, begin)
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

    generator = torch.Generator().manual_seed(seed)
    starts = _sample_starts(len(stream), nsamples, seqlen, generator).unsqueeze(1)

    # A piece that begins with the same tokens already, as a chat does, does not get them twice.
    front = stream.new_tensor(list(begin))
    repeated = (stream[starts + torch.arange(len(begin))] == front).all(dim=1, keepdim=True)
    starts += len(begin) * repeated
    return torch.cat([front.expand(nsamples, -1), stream[starts + torch.arange(room)]], dim=1)


def _sample_starts(
    tokens: int, nsamples: int, seqlen: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Draw the places where samples begin, each uniformly; the last ones leave room for a sample."""
    # Of a long text hardly any held-out sample shares tokens with another one.
    apart = held_out_samples(nsamples)
    if tokens >= AMPLE_TEXT * nsamples * seqlen or apart == 0:
        return torch.randint(tokens - seqlen + 1, (nsamples,), generator=generator)
    if tokens < 2 * seqlen:
        warn(
            f"calibration text has {tokens} tokens, too few to hold samples of {seqlen} apart: how much "
            "layers correct those before is judged on tokens that they were fitted to"
        )
        return torch.randint(tokens - seqlen + 1, (nsamples,), generator=generator)

    # The end of every period is kept apart, so that held-out samples come from all over the text.
    period = tokens // max(1, tokens // (STRETCH * HELD_OUT_SHARE * seqlen))
    stretch = max(seqlen, period // HELD_OUT_SHARE)
    kept_apart = torch.arange(tokens) % period >= period - stretch
    before = torch.cat([torch.zeros(1, dtype=torch.int64), kept_apart.cumsum(0)])
    tokens_apart = before[seqlen:] - before[:-seqlen]  # of the sample that begins at each place

    places = [(tokens_apart == 0).nonzero()[:, 0], (tokens_apart == seqlen).nonzero()[:, 0]]
    return torch.cat(
        [
            choices[torch.randint(len(choices), (count,), generator=generator)]
            for choices, count in zip(places, (nsamples - apart, apart), strict=True)
        ]
    )


def chunks(
    stream: Int[Tensor, " n"],
    seqlen: int,
    batch_size: int = 1,
    begin: Sequence[int] = (),
    *,
    name: str = "",
    remedy: str = "give more text or lower --seqlen",
) -> Iterable[Int[Tensor, "b t"]]:
    """Cut a token stream into chunks without overlap, in batches; the tail is left out.

    A piece that begins with the tokens of ``begin`` already, as a chat does, does not get them twice.

    Args:
        stream: Token ids.
        seqlen: Tokens per chunk, those in front included.
        batch_size: Chunks per batch.
        begin: What stands in front of every chunk, see ``begin_tokens``.
        name: Of the text, for messages.
        remedy: What helps if the text is too short.

    Raises:
        InputError: If the stream does not fill one chunk.
    """
    # Where the pieces are: each follows the one before.
    room = _room(seqlen, begin)
    front = stream.new_tensor(list(begin))
    starts, place = [], 0
    while True:
        if torch.equal(stream[place : place + len(begin)], front):
            place += len(begin)
        if place + room > len(stream):
            break
        starts.append(place)
        place += room
    if not starts:
        text = f"evaluation text {name}".rstrip()
        raise InputError(
            f"{text} has {len(stream)} tokens, fewer than one chunk of {seqlen}; {remedy}"
        )

    pieces = stream[torch.tensor(starts)[:, None] + torch.arange(room)]
    return torch.cat([front.expand(len(starts), -1), pieces], dim=1).split(batch_size)


def _room(seqlen: int, begin: Sequence[int]) -> int:
    """Return how many tokens of the text a sample holds."""
    if seqlen <= len(begin):
        raise InputError(
            f"seqlen is {seqlen}, and the tokenizer puts {len(begin)} tokens in front; "
            f"give {len(begin) + 1} or more"
        )
    return seqlen - len(begin)


def default_seqlen(context: int) -> int:
    """Return the literature's chunk length, or the model's limit where that is shorter."""
    return min(LITERATURE_SEQLEN, context)
