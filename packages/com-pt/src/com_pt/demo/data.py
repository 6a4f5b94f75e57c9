"""Handwritten digits from scikit-learn, as tasks: pairs with captions, and images with labels.

The demo trains on pairs. A picture is two digits side by side; a caption names them in one of three
ways, one of them in reverse order. Zero-shot classification is 100-way, over pairs of digits that
training never showed.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from com_pt.method.metrics import encode_images, encode_texts, evaluate_zero_shot, similarities
from com_pt.training.data.tokenizers import WordTokenizer
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = [*NUMBERS, "a", "photo", "of", "then", "left", "right", "to", "the"]
TEMPLATES = ("a photo of {0} then {1}", "{0} left of {1}", "{1} right of {0}")
TRAIN_DIGITS = 1400  # of 1,797; the others are held out
CONTEXT_LENGTH, VOCABULARY = 8, 20  # tokens of a caption, and token ids


class DigitPairs(ClipTask):
    """CLIP on pairs of digits.

    Data settings: ``pairs`` (samples of an epoch), ``held_out`` (test pairs), ``pair_seed``.
    """

    has_readers: ClassVar[bool] = False  # they are in memory

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(
            {"tokenizer": WORDS, "context_length": CONTEXT_LENGTH, "image_size": [8, 16]}
        )
        from sklearn.datasets import load_digits

        # Digits in an order of their own; the first ones are for training.
        digits: Any = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, self.labels = images[order], labels[order]

        # Pairs of an epoch.
        self.size = int(data.get("pairs", 6400))
        generator = torch.Generator().manual_seed(int(data.get("pair_seed", 0)))
        self.pairs = torch.randint(TRAIN_DIGITS, (self.size, 2), generator=generator)

        # Captions of all classes.
        self.tokenize = WordTokenizer(WORDS, CONTEXT_LENGTH)
        prompts = [self._tokens(a, b) for a in range(10) for b in range(10)]
        self.prompts = torch.stack(prompts)  # [100, 3, length]

        # Pairs of digits that training never shows.
        generator = torch.Generator().manual_seed(12345)
        count, held_out = int(data.get("held_out", 1500)), len(images) - TRAIN_DIGITS
        self.test = TRAIN_DIGITS + torch.randint(held_out, (count, 2), generator=generator)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        template = int(torch.randint(3, ()))
        return self.picture(pair), self.prompts[self._class(pair), template][None]

    def picture(self, pair: Tensor) -> Tensor:
        """Return the picture [3, 8, 16] of two digits."""
        return torch.cat([self.images[pair[0]], self.images[pair[1]]], 1).expand(3, -1, -1)

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure 100-way zero-shot accuracy with an ensemble of the three templates."""
        images = torch.stack([self.picture(pair) for pair in self.test])
        labels = torch.stack([self._class(pair) for pair in self.test])
        with torch.no_grad():
            metrics = evaluate_zero_shot(model, images, labels, self.prompts, batch=512)
            return {**metrics, "held-out loss": self._loss(model, images, labels)}

    def chance(self) -> float:
        """Return one in a hundred."""
        return 0.01

    def _loss(self, model: Any, images: Tensor, labels: Tensor) -> float:
        text_features = encode_texts(model, self.prompts.flatten(0, 1), batch=512)
        classes = F.normalize(text_features.unflatten(0, self.prompts.shape[:2]).mean(1), dim=-1)
        pictures = encode_images(model, images, batch=512)
        logits = similarities(model.logit_scale.exp() * pictures, classes)
        return float(F.cross_entropy(logits, labels.to(logits.device)))

    def _class(self, pair: Tensor) -> Tensor:
        return self.labels[pair[0]] * 10 + self.labels[pair[1]]

    def _tokens(self, first: int, second: int) -> Tensor:
        texts = [template.format(NUMBERS[first], NUMBERS[second]) for template in TEMPLATES]
        return self.tokenize(texts)


class DigitImages(ClassifyTask):
    """8x8 digits with random shifts and noise; ``noise`` is the deviation added in training."""

    has_readers: ClassVar[bool] = False  # they are in memory

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({"classes": 10})
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images = images[order].expand(-1, 3, -1, -1)
        self.labels = torch.tensor(digits.target)[order]
        self.noise = float(data.get("noise", 0.3))

    def __len__(self) -> int:
        return TRAIN_DIGITS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        image = torch.roll(image, (dy, dx), (1, 2))
        return image + self.noise * torch.randn(image.shape), self.labels[index]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure top-1 on the 397 held-out digits."""
        return self.accuracy(model, self.images[TRAIN_DIGITS:], self.labels[TRAIN_DIGITS:])

    def chance(self) -> float:
        """Return one in ten."""
        return 0.1
