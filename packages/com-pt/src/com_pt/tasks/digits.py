"""Pairs of handwritten digits with captions: the demo's data, from scikit-learn.

A picture is two digits side by side; a caption names them in one of three ways, one of them in reverse
order. Zero-shot classification is 100-way, over pairs of digits that training never showed.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from com_pt.data.captions import WordTokenizer
from com_pt.evaluate import encoded_images, encoded_texts, evaluate_zero_shot, similarities
from com_pt.tasks.clip import ClipTask

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = [*NUMBERS, "a", "photo", "of", "then", "left", "right", "to", "the"]
TEMPLATES = ("a photo of {0} then {1}", "{0} left of {1}", "{1} right of {0}")
TRAIN, LENGTH, VOCABULARY = 1400, 8, 20


class DigitPairs(ClipTask):
    """CLIP on pairs of digits.

    Data settings: ``pairs`` (samples of an epoch), ``held_out`` (test pairs), ``pair_seed``.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({"tokenizer": WORDS, "context_length": LENGTH, "image_size": [8, 16]})
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, self.labels = images[order], labels[order]
        self.size = int(data.get("pairs", 6400))
        generator = torch.Generator().manual_seed(int(data.get("pair_seed", 0)))
        self.pairs = torch.randint(TRAIN, (self.size, 2), generator=generator)
        self.tokenize = WordTokenizer(WORDS, LENGTH)
        prompts = [self._tokens(a, b) for a in range(10) for b in range(10)]
        self.prompts = torch.stack(prompts)  # [100, 3, length]
        held = torch.Generator().manual_seed(12345)
        count = int(data.get("held_out", 1500))
        self.test = TRAIN + torch.randint(len(images) - TRAIN, (count, 2), generator=held)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        template = int(torch.randint(3, ()))
        return self.picture(pair), self.prompts[self._class(pair), template][None]

    def picture(self, pair: Tensor) -> Tensor:
        """[3, 8, 16] of two digits."""
        return torch.cat([self.images[pair[0]], self.images[pair[1]]], 1).expand(3, -1, -1)

    def evaluate(self, model: Any) -> dict[str, float]:
        """100-way zero-shot accuracy with an ensemble of the three templates."""
        images = torch.stack([self.picture(pair) for pair in self.test])
        labels = torch.stack([self._class(pair) for pair in self.test])
        with torch.no_grad():
            metrics = evaluate_zero_shot(model, images, labels, self.prompts, batch=512)
            return {**metrics, "held-out loss": self._loss(model, images, labels)}

    def chance(self) -> float:
        """One in a hundred."""
        return 0.01

    def _loss(self, model: Any, images: Tensor, labels: Tensor) -> float:
        words = encoded_texts(model, self.prompts.flatten(0, 1), batch=512)
        classes = F.normalize(words.unflatten(0, self.prompts.shape[:2]).mean(1), dim=-1)
        pictures = encoded_images(model, images, batch=512)
        logits = similarities(model.logit_scale.exp() * pictures, classes)
        return float(F.cross_entropy(logits, labels.to(logits.device)))

    def _class(self, pair: Tensor) -> Tensor:
        return self.labels[pair[0]] * 10 + self.labels[pair[1]]

    def _tokens(self, first: int, second: int) -> Tensor:
        texts = [template.format(NUMBERS[first], NUMBERS[second]) for template in TEMPLATES]
        return self.tokenize(texts)


def pair_model(
    vision_width: int, text_width: int, layers: int = 2, text_layers: int = 2, embed: int = 64
) -> dict[str, Any]:
    """Settings of an open_clip model for these pictures: patch 4, heads of 16."""
    vision: dict[str, Any] = {"image_size": [8, 16], "layers": layers, "width": vision_width}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": text_width}
    return {
        "embed_dim": embed,
        "vision_cfg": {**vision, "patch_size": 4, "head_width": 16},
        "text_cfg": {**text, "heads": text_width // 16, "layers": text_layers},
    }
