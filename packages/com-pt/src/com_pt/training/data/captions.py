"""Images with one or several captions, as samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from com_pt.training.data.decoding import decode_picture
from com_pt.training.data.labelling import Pictures
from com_pt.training.data.pairs import read_pairs
from com_pt.training.data.sentences import CaptionRule
from com_pt.training.data.tokenizers import Tokenizer, make_tokenizer
from com_pt.training.data.transforms import crop_range, image_transform

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


def caption_transform(data: Mapping[str, Any], part: str) -> Callable[[Any], Tensor]:
    """Make the transform of a part's pictures: random crops for ``train``, else the centre."""
    crop = crop_range(data, TRAINING_CROP) if part == "train" else None
    return image_transform(data.get("image_size", 224), crop)
