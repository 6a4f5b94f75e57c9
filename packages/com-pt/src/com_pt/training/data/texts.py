"""Blocks of equal length from text files, which follow one another with an end of text behind each."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from com_pt.training.data.decoding import decode_lines, decoding
from com_pt.training.data.patterns import expand_paths
from effml_common.errors import InputError

BYTE_TOKENS = 257  # 256 bytes and an end of text
MOST_MAPPED = 1000  # files that a process maps at once


class Tokens(Protocol):
    """A long row of token ids."""

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> Tensor:
        """Return the ids from ``first`` to ``last`` - 1; int64."""
        ...


class TextBlocks:
    """Blocks of a row of tokens; the incomplete last one is left out.

    Args:
        tokens: The row.
        length: Tokens of a block.

    Raises:
        InputError: If there is no complete block.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        if len(self) == 0:
            raise InputError(
                f"the text has {len(tokens)} tokens, fewer than a block of {length}; add text"
            )

    @classmethod
    def open(cls, data: Mapping[str, Any], part: str, length: int) -> "TextBlocks":
        """Open the text of ``data[part]``.

        Raises:
            InputError: If there is none, it cannot be read, or there is no such tokenizer.
        """
        source = data.get(part)
        if not source:
            raise InputError(f"no {part} data are given; name text files under data: {part}")
        paths = sorted({*expand_paths(source, f"data: {part}")})
        tokenizer = data.get("tokenizer", "bytes")
        tokens = MappedBytes(paths) if tokenizer == "bytes" else TokenizedText(paths, tokenizer)
        return cls(tokens, length)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int | slice) -> Tensor:
        """Return a block [length], or several [n, length]; int64."""
        if isinstance(index, slice):
            blocks = [self[i] for i in range(*index.indices(len(self)))]
            return torch.stack(blocks) if blocks else torch.empty(0, self.length).long()
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens.read(index * self.length, (index + 1) * self.length)


class MappedBytes:
    """Bytes of files as tokens, with token 256 behind each; files are mapped and not read at the start.

    Args:
        paths: The files.

    Raises:
        InputError: If one cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.sizes = []
        for path in self.paths:
            with decoding(str(path), "check the path"), open(path, "rb") as file:
                self.sizes.append(file.seek(0, 2))
        self.ends = list(accumulate(size + 1 for size in self.sizes))
        self._mapped: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself, instead of being sent their content.
        return {**vars(self), "_mapped": {}}

    def read(self, first: int, last: int) -> Tensor:
        """Return the tokens from ``first`` to ``last`` - 1."""
        parts = []
        number = bisect_right(self.ends, first)
        while first < last:
            # The part of this file, and its end of text if that is reached.
            begin = self.ends[number] - self.sizes[number] - 1
            stop = min(last, self.ends[number])
            parts.append(self._map(number)[first - begin : stop - begin].long())
            if stop == self.ends[number]:
                parts.append(torch.tensor([BYTE_TOKENS - 1]))
            first, number = stop, number + 1
        return torch.cat(parts)

    def _map(self, number: int) -> Tensor:
        """Return the bytes of a file [size], which the system reads when they are touched."""
        if number not in self._mapped:
            if len(self._mapped) >= MOST_MAPPED:
                self._mapped.clear()
            path, size = str(self.paths[number]), self.sizes[number]
            with decoding(path, "check the path"):
                self._mapped[number] = (
                    torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
                    if size
                    else torch.empty(0, dtype=torch.uint8)
                )
        return self._mapped[number]


class TokenizedText:
    """Token ids of files by a Hugging Face tokenizer, with its end of text behind each; int32 in memory.

    Args:
        paths: The files, UTF-8.
        folder: Of the tokenizer.

    Raises:
        InputError: If there is no such tokenizer, it has no end of text, or a file is not UTF-8.
    """

    def __init__(self, paths: Sequence[Path], folder: str) -> None:
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {folder} has no end of text; set eos_token in its tokenizer_config.json"
            )
        end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
        parts = []
        for path in paths:
            text = "".join(decode_lines(path)).replace("\r\n", "\n")
            with decoding(str(path), f"check the tokenizer {folder}"):
                parts.append(torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32))
            parts.append(end)
        self.ids = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, first: int, last: int) -> Tensor:
        """Return the tokens from ``first`` to ``last`` - 1."""
        return self.ids[first:last].long()


def load_tokenizer(folder: str) -> Any:
    """Load a tokenizer from its folder, without running code that may lie there.

    Raises:
        InputError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise InputError(f"there is no tokenizer {folder}; use bytes or a tokenizer's folder")
    with decoding(f"the tokenizer {folder}", "check the folder"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
