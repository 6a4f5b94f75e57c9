"""Texts and places of millions of samples in a few buffers.

A Python list of lists costs more than 2 kB a sample, and a reader process copies what it touches,
because each access changes a reference count. Tensors have no such counts: forked processes read the
same pages, and spawned ones get them through shared memory.
"""

import tarfile
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from com_pt.training.data.decoding import decoding

WHOLE_FILE = -1  # size of a picture that is a file of its own


class TextBuffer:
    """Collects lists of texts."""

    def __init__(self) -> None:
        self.content, self.text_ends, self.list_ends = bytearray(), array("q", [0]), array("q", [0])

    def append(self, texts: Iterable[str]) -> None:
        """Add the texts of one sample."""
        for text in texts:
            self.content += text.encode()
            self.text_ends.append(len(self.content))
        self.list_ends.append(len(self.text_ends) - 1)

    def pack(self) -> "PackedTexts":
        """Return what was collected; nothing can be added any more."""
        return PackedTexts(
            _tensor(self.content, torch.uint8), _tensor(self.text_ends), _tensor(self.list_ends)
        )


class PackedTexts(Sequence[list[str]]):
    """Lists of texts: one buffer of UTF-8, and where each text and each list ends.

    Args:
        content: UTF-8, uint8.
        text_ends: Where each text ends in it, after a 0; int64.
        list_ends: Where each list ends among the texts, after a 0; int64.

    Example:
        >>> texts = PackedTexts.of([["a cat", "a pet"], ["ein Hündchen"]])
        >>> texts[1], len(texts)
        (['ein Hündchen'], 2)
    """

    def __init__(self, content: Tensor, text_ends: Tensor, list_ends: Tensor) -> None:
        self.content, self.text_ends, self.list_ends = content, text_ends, list_ends

    @classmethod
    def of(cls, lists: Iterable[Iterable[str]]) -> "PackedTexts":
        """Pack lists of texts, one after the other."""
        buffer = TextBuffer()
        for texts in lists:
            buffer.append(texts)
        return buffer.pack()

    def __len__(self) -> int:
        return len(self.list_ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)

        # The texts of a list lie one after the other.
        index %= len(self)
        first, last = self.list_ends[index : index + 2].tolist()
        ends = self.text_ends[first : last + 1].tolist()
        content = self.content.numpy()
        return [content[begin:end].tobytes().decode() for begin, end in pairwise(ends)]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.content.nbytes + self.text_ends.nbytes + self.list_ends.nbytes


class FileBuffer:
    """Collects places of pictures."""

    def __init__(self) -> None:
        self.paths, self.last_path = TextBuffer(), ""
        self.numbers, self.offsets, self.sizes = array("i"), array("q"), array("q")

    def append(self, path: str | Path, offset: int = 0, size: int = WHOLE_FILE) -> None:
        """Add a picture: a file, or a part of one; neighbours in one file share its path."""
        if not self.numbers or str(path) != self.last_path:
            self.last_path = str(path)
            self.paths.append([self.last_path])
        self.numbers.append(len(self.paths.list_ends) - 2)
        self.offsets.append(offset)
        self.sizes.append(size)

    def pack(self) -> "PackedFiles":
        """Return what was collected; nothing can be added any more."""
        numbers = _tensor(self.numbers, torch.int32)
        return PackedFiles(self.paths.pack(), numbers, _tensor(self.offsets), _tensor(self.sizes))


class PackedFiles:
    """Pictures in files.

    Args:
        paths: Of the files.
        numbers: File of each picture; int32.
        offsets: Where it begins there, in bytes; int64.
        sizes: Bytes of each; -1 is a whole file; int64.
    """

    def __init__(self, paths: PackedTexts, numbers: Tensor, offsets: Tensor, sizes: Tensor) -> None:
        self.paths, self.numbers, self.offsets, self.sizes = paths, numbers, offsets, sizes

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """Return the path of a picture's file, and the sample of one in a tar."""
        path = self._path(index)
        if int(self.sizes[index]) == WHOLE_FILE:
            return path

        # The header before a picture is read again, since names would double the buffers.
        with suppress(OSError, ValueError, tarfile.TarError), open(path, "rb") as file:
            file.seek(int(self.offsets[index]) - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").name
            folder, slash, name = member.rpartition("/")
            return f"{path}, sample {folder}{slash}{name.partition('.')[0]}"
        return path

    def content(self, index: int) -> bytes:
        """Read the bytes of a picture.

        Raises:
            InputError: If the file cannot be read, or has become shorter.
        """
        path, size = self._path(index), int(self.sizes[index])
        with decoding(self.name(index), "check the path"), open(path, "rb") as file:
            file.seek(int(self.offsets[index]))
            content = file.read(None if size == WHOLE_FILE else size)
            if len(content) < size:
                raise ValueError("the file has become shorter")
            return content

    def _path(self, index: int) -> str:
        return self.paths[int(self.numbers[index])][0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = (self.paths, self.numbers, self.offsets, self.sizes)
        return sum(values.nbytes for values in arrays)


def _tensor(values: "array[int] | bytearray", dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a tensor on the memory of an array, which nothing else may change any more."""
    return torch.frombuffer(values, dtype=dtype) if len(values) else torch.empty(0, dtype=dtype)
