"""From texts to token ids: CLIP's own tokenizer, a Hugging Face one, or whole words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_pt.training.data.decoding import decoding
from effml_common.errors import InputError

Tokenizer = Callable[[list[str]], Tensor]


def make_tokenizer(data: Mapping[str, Any]) -> Tokenizer:
    """Make CLIP's own tokenizer, a Hugging Face one from its folder, or one of a list of words.

    A list of words gives ids from 1 on and an end token with the largest id.

    Raises:
        InputError: If there is no such folder.
    """
    kind, length = data.get("tokenizer", "simple"), data.get("context_length")
    if isinstance(kind, list | tuple):
        return WordTokenizer(list(kind), length or 77)
    if kind == "simple":
        from open_clip import SimpleTokenizer

        simple = SimpleTokenizer(context_length=length or 77)
        return lambda texts: simple(texts)
    loaded = _load_folder(kind, length or 77)
    return lambda texts: loaded(texts)


def vocabulary_size(data: Mapping[str, Any]) -> int:
    """Return the number of a tokenizer's ids.

    Raises:
        InputError: If there is no such folder, or it cannot be loaded.
    """
    kind = data.get("tokenizer", "simple")
    if isinstance(kind, list | tuple):
        return len(kind) + 2
    return 49408 if kind == "simple" else len(_load_folder(kind, 77).tokenizer)


def _load_folder(folder: Any, length: int) -> Any:
    from open_clip.tokenizer import HFTokenizer

    if not Path(str(folder)).is_dir():
        raise InputError(
            f"there is no tokenizer {folder}; use simple, a list of words or a tokenizer's folder"
        )
    with decoding(f"the tokenizer {folder}", "check the folder"):
        return HFTokenizer(str(folder), context_length=length)


class WordTokenizer:
    """Whole words of a closed vocabulary; the end token has the largest id, as CLIP pools there."""

    def __init__(self, words: list[str], length: int) -> None:
        self.ids = {word: i for i, word in enumerate(words, 1)}
        self.end, self.length = len(words) + 1, length

    def __call__(self, texts: list[str]) -> Tensor:
        """Return token ids [n, length], padded with 0.

        Raises:
            InputError: If a word is not in the vocabulary.
        """
        rows = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = text.lower().split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise InputError(f"the word {unknown[0]} is not in the vocabulary; add it")
            ids = [*[self.ids[w] for w in words][: self.length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows
