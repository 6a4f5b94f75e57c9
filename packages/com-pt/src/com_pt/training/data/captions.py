"""Images with one or several captions, from CSV, TSV or WebDataset tars."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_pt.training.data.tokenizers import Tokenizer, make_tokenizer
from com_pt.training.data.transforms import crop_range, image_transform
from effml_common.errors import InputError
from effml_common.parsing import one_line

IMAGE_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class ByteRange:
    """Where an image's bytes are: a file, or a part of a tar."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


class CaptionData:
    """Samples of (image [3, h, w], tokens [k, length]).

    Args:
        places: One per image.
        texts: The captions of each image.
        tokenize: Texts to token ids [n, length].
        transform: A picture to a tensor.
        captions: How many captions are drawn for each sample; None takes all.
    """

    def __init__(
        self,
        places: Sequence[ByteRange],
        texts: list[list[str]],
        tokenize: Tokenizer,
        transform: Callable[[Any], Tensor],
        captions: int | None,
    ) -> None:
        self.places, self.texts, self.tokenize = places, texts, tokenize
        self.transform, self.captions = transform, captions
        fewest, place = min(zip(map(len, texts), places, strict=True), key=lambda pair: pair[0])
        if captions is not None and fewest < captions:
            raise InputError(
                f"{place.path}: an image has {fewest} captions, but {captions} are drawn for each; "
                f"add captions or set captions: {fewest}"
            )

    @classmethod
    def open(cls, data: Mapping[str, Any], part: str, *, captions: int | None) -> "CaptionData":
        """Open the pairs of ``data[part]``.

        Args:
            data: Settings of the task's data.
            part: ``train``, with random crops, or ``val``.
            captions: How many captions are drawn for each sample; None takes all.

        Raises:
            InputError: If there are none, a file is missing or a line is wrong; names the line.
        """
        # The files that the settings name.
        source = data.get(part)
        if not source:
            raise InputError(f"no {part} data are given; name a CSV, TSV or tar under data: {part}")
        paths = [Path(p) for p in ([source] if isinstance(source, str) else source)]

        # Their samples, one file after the other.
        places: list[ByteRange] = []
        texts: list[list[str]] = []
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} is not there; check data: {part}")
            file_places, file_texts = (
                read_tar(path) if path.suffix == ".tar" else read_table(path, data.get("images"))
            )
            places += file_places
            texts += file_texts
        if not places:
            raise InputError(f"{paths[0]} holds no samples; give a file with some")

        # What turns them into tensors.
        transform = image_transform(
            data.get("image_size", 224),
            crop_range(data, (0.9, 1.0)) if part == "train" else None,
        )
        return cls(places, texts, make_tokenizer(data), transform, captions)

    def __len__(self) -> int:
        return len(self.places)

    def image(self, index: int) -> Tensor:
        """Read one image.

        Raises:
            OSError: If it cannot be decoded.
        """
        from PIL import Image

        place = self.places[index]
        try:
            with Image.open(io.BytesIO(place.read())) as picture:
                return self.transform(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{place.path}: {one_line(str(error))}") from error

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, texts = self.image(index), self.texts[index]
        if self.captions is not None and self.captions < len(texts):
            texts = [texts[i] for i in torch.randperm(len(texts))[: self.captions].tolist()]
        return image, self.tokenize(texts)

    def for_retrieval(self) -> tuple[Tensor, list[Tensor]]:
        """Read all images, and the tokens of all captions of each."""
        images = torch.stack([self.image(i) for i in range(len(self))])
        return images, [self.tokenize(texts) for texts in self.texts]


def read_table(path: Path, images: str | None) -> tuple[list[ByteRange], list[list[str]]]:
    """Read the rows of a CSV, or tab-separated, file with a header: a path, then captions.

    Args:
        path: The file.
        images: Folder that its paths are relative to; None is its own.

    Raises:
        InputError: If a line has another number of columns, no caption or a missing image.
    """
    root = Path(images) if images else path.parent
    places: list[ByteRange] = []
    texts: list[list[str]] = []
    with open(path, encoding="utf-8", newline="") as file:
        # A tab in the header tells the kind of file, whatever its name.
        tabs = path.suffix.lower() in (".tsv", ".tab") or "\t" in file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter="\t" if tabs else ",")
        columns = len(next(rows, []))
        if columns < 2:
            raise InputError(f"{path} has no header with a path and captions; add one")

        # Every row is complete, and its image is there.
        for row in rows:
            captions = [text for text in row[1:] if text.strip()]
            if len(row) != columns or not captions:
                raise InputError(
                    f"{path}, line {rows.line_num}: {len(row)} columns, not {columns}, or no caption"
                    "; correct the line"
                )
            if not (root / row[0]).is_file():
                raise InputError(
                    f"{path}, line {rows.line_num}: {row[0]} is not there; "
                    "correct the path or data: images"
                )
            places.append(ByteRange(root / row[0]))
            texts.append(captions)
    return places, texts


def read_tar(path: Path) -> tuple[list[ByteRange], list[list[str]]]:
    """Index the samples of a WebDataset shard: an image beside ``.txt`` (a caption a line) or ``.json``.

    JSON holds ``captions`` (a list) or ``caption``. The tar is indexed, not unpacked.

    Raises:
        InputError: If it is damaged, or an image has no caption.
    """
    # A sample's files have one stem; their order in the tar does not matter.
    places: dict[str, ByteRange] = {}
    texts: dict[str, list[str]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, extension = Path(member.name).name.partition(".")
                key, extension = f"{Path(member.name).parent}/{stem}", f".{extension.lower()}"
                content = tar.extractfile(member)
                if content is None:
                    continue
                if extension in IMAGE_EXTENSIONS:
                    places[key] = ByteRange(path, member.offset_data, member.size)
                elif extension == ".txt":
                    texts[key] = [line for line in content.read().decode().splitlines() if line]
                elif extension == ".json":
                    record = json.load(content)
                    texts[key] = list(record.get("captions") or [record["caption"]])
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no WebDataset shard: {one_line(str(error))}; make it again"
        ) from error

    # Captions without an image are left out; an image without a caption is a fault.
    silent = [key for key in places if not texts.get(key)]
    if silent:
        name = Path(silent[0]).name
        raise InputError(f"{path}: {silent[0]} has no caption; add {name}.txt or .json")
    return list(places.values()), [texts[key] for key in places]
