"""Which texts a sample has: captions as they are, or the raw caption and sentences of the others.

The paper's data have a raw caption and six that models wrote. A sample is the raw caption and six
sentences, drawn anew each time from all sentences of those six (DreamLIP's data code, which the released
code follows). Two defects of the released draw are not copied: it has at most four outcomes for an
image, and never takes the last sentence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effml_common.errors import InputError

# DreamLIP splits at every period. Here a period within a number, as in 3.5, ends no sentence. Chinese
# and Japanese have marks of their own, which end a sentence wherever they stand.
SENTENCE_END = re.compile(r"\n|</s>|[.](?!\d)|[。！？｡]")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a caption, without their periods.

    Example:
        >>> split_sentences("A dog runs. It is 3.5 years old.</s>")
        ['A dog runs', 'It is 3.5 years old']
    """
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


@dataclass(frozen=True)
class CaptionRule:
    """How the texts of a sample are drawn from what stands beside its image.

    Attributes:
        drawn: Texts of a sample; None takes all captions.
        sentences: Whether all but the first are sentences instead of whole captions.
    """

    drawn: int | None = None
    sentences: bool = False

    def accept(self, captions: Sequence[str], place: str) -> list[str]:
        """Return the captions that are not blank.

        Args:
            captions: Of one image; with ``sentences`` the first is the raw one.
            place: Where they stand, for the message.

        Raises:
            InputError: If they do not suffice.
        """
        texts = [text for text in captions if text.strip()]
        if not texts:
            raise InputError(f"{place}: no caption; add one, or leave the image out")

        # The raw caption must be there, and something to draw sentences from.
        if self.sentences:
            if not captions[0].strip():
                raise InputError(f"{place}: the first caption, the raw one, is empty; add it")
            if not any(split_sentences(text) for text in texts[1:]):
                raise InputError(
                    f"{place}: no caption beside the raw one to draw sentences from; "
                    "add some or set sentences: false"
                )
        elif self.drawn is not None and len(texts) < self.drawn:
            raise InputError(
                f"{place}: {len(texts)} caption{'s' * (len(texts) > 1)}, but {self.drawn} are drawn "
                f"for each image; add captions or set captions: {len(texts)}"
            )
        return texts

    def draw(self, texts: Sequence[str]) -> list[str]:
        """Draw the texts of a sample from torch's generator.

        Captions are drawn without replacement. So are sentences, unless there are too few of them.
        """
        if self.drawn is None:
            return list(texts)
        if not self.sentences:
            if self.drawn >= len(texts):
                return list(texts)
            places: list[int] = torch.randperm(len(texts))[: self.drawn].tolist()
            return [texts[i] for i in places]

        # The raw caption, then sentences of all others.
        raw = texts[0]
        sentences = [sentence for text in texts[1:] for sentence in split_sentences(text)]
        count = self.drawn - 1
        if count <= len(sentences):
            chosen = torch.randperm(len(sentences))[:count]
        else:
            chosen = torch.randint(len(sentences), (count,))
        return [raw, *(sentences[i] for i in chosen.tolist())]
