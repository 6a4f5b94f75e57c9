"""Images with one or several captions, as samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from com_pt.training.data.counts import read_count
from com_pt.training.data.decoding import decode_picture
from com_pt.training.data.labelling import Pictures
from com_pt.training.data.pairs import read_pairs
from com_pt.training.data.patterns import expand_paths, is_pattern
from com_pt.training.data.sentences import CaptionRule
from com_pt.training.data.stream import ShardStream
from com_pt.training.data.tokenizers import Tokenizer, make_tokenizer
from com_pt.training.data.transforms import crop_range, image_transform
from effml_common.errors import InputError

TABLES = (".csv", ".tsv", ".tab")
SHUFFLE_BUFFER = 5000  # samples that wait in a stream
TRAINING_CROP = (0.9, 1.0)  # share of the area that a random crop keeps


class CaptionData:
    """Samples of (image [3, h, w], tokens [k, length]).

    Args:
        pictures: Undecoded pictures.
        texts: The captions of each.
        tokenize: Texts to token ids [n, length].
        transform: A picture to a tensor.
        rule: Which texts are drawn for each sample.
    """

    def __init__(
        self,
        pictures: Pictures,
        texts: Sequence[list[str]],
        tokenize: Tokenizer,
        transform: Callable[[Any], Tensor],
        rule: CaptionRule,
    ) -> None:
        self.pictures, self.texts, self.tokenize = pictures, texts, tokenize
        self.transform, self.rule = transform, rule

    @classmethod
    def open(cls, data: Mapping[str, Any], part: str, *, captions: int | None) -> "CaptionData":
        """Open the pairs of ``data[part]``.

        Args:
            data: Settings of the task's data.
            part: ``train``, with random crops, or ``val``.
            captions: How many texts are drawn for each sample; None takes all captions.

        Raises:
            InputError: If there are none, a file is missing, or a row or sample is wrong; names it.
        """
        rule = CaptionRule(captions, captions is not None and bool(data.get("sentences")))
        pictures, texts = read_pairs(data, part, rule)
        return cls(pictures, texts, make_tokenizer(data), caption_transform(data, part), rule)

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> Tensor:
        """Read one image.

        Raises:
            InputError: If it cannot be decoded.
        """
        content, name = self.pictures.content(index), self.pictures.name(index)
        return self.transform(decode_picture(content, name))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.image(index)
        return image, self.tokenize(self.rule.draw(self.texts[index]))


class StreamedCaptionData:
    """Samples of (image, tokens) by the stream's numbers, read when they are due.

    Args:
        stream: The shards.
        data: Settings of the task's data, for tokenizer, transform and ``caption_key``.
        rule: Which texts are drawn for each sample.
    """

    def __init__(self, stream: ShardStream, data: Mapping[str, Any], rule: CaptionRule) -> None:
        self.stream, self.rule, self.caption_key = stream, rule, data.get("caption_key")
        self.tokenize, self.transform = make_tokenizer(data), caption_transform(data, "train")

    @classmethod
    def open(cls, data: Mapping[str, Any], *, captions: int) -> "StreamedCaptionData":
        """Open the shards of ``data["train"]`` and read the first sample.

        Raises:
            InputError: If a shard is not there, or the first sample cannot be read.
        """
        # The shards, and how many samples an epoch has.
        paths = expand_paths(data["train"], "data: train")
        wrong = next((path for path in paths if path.suffix.lower() != ".tar"), None)
        if wrong is not None:
            raise InputError(f"{wrong} is no tar, and only tars are streamed; set stream: false")
        samples = read_count(data, "samples", 1) if data.get("samples") is not None else None
        stream = ShardStream(paths, samples, read_count(data, "shuffle_buffer", SHUFFLE_BUFFER))

        # A fault that all samples share is met here and not among those that are skipped.
        opened = cls(stream, data, CaptionRule(captions, bool(data.get("sentences"))))
        opened[stream.first()]
        return opened

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        index, number = self.stream.locate(key)
        place = index.where(number)
        texts = self.rule.accept(index.captions(number, self.caption_key), place)
        image = self.transform(decode_picture(index.image(number), place))
        return image, self.tokenize(self.rule.draw(texts))


def is_streamed(data: Mapping[str, Any]) -> bool:
    """Return whether training data are streamed: as ``stream`` says, else patterns but of tables."""
    source, stream = data.get("train"), data.get("stream")
    if not source or stream is not None:
        return bool(source) and bool(stream)
    names = [source] if isinstance(source, str | Path) else source
    return is_pattern(source) and not any(str(name).lower().endswith(TABLES) for name in names)


def caption_transform(data: Mapping[str, Any], part: str) -> Callable[[Any], Tensor]:
    """Make the transform of a part's pictures: random crops for ``train``, else the centre."""
    crop = crop_range(data, TRAINING_CROP) if part == "train" else None
    return image_transform(data.get("image_size", 224), crop)
