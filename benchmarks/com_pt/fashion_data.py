"""Fashion-MNIST as tasks: 28x28 pictures of clothes with labels, or with captions made from the labels.

The data are those of Debian's package ``dataset-fashion-mnist`` (MIT licence): 60,000 pictures to train
on and 10,000 to judge on. Learning rates are tuned on development data: the last 5,000 training
pictures, which are left out of training then. Pictures are not augmented: small models reach the end of
what they can learn from them in an affordable number of updates.
"""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from com_pt.method.metrics import evaluate_zero_shot
from com_pt.training.data.tokenizers import WordTokenizer
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.errors import InputError

FOLDER = "/usr/share/datasets/fashion-mnist"  # where the Debian package puts the files
DEVELOPMENT_IMAGES = 5_000  # of the training pictures
MEAN, DEVIATION = 0.286, 0.353  # of the training pictures' brightness in [0, 1]
SIZE = 28  # pixels, both ways
CLASSES = (
    "top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a small grey {}", "one {} in the shop")
WORDS = sorted({word for text in TEMPLATES for word in text.split() if word != "{}"} | {*CLASSES})
CONTEXT_LENGTH = 8  # tokens of a caption


class FashionImages:
    """The pictures and labels of one role: ``confirm`` with all data, or ``tune``.

    Args:
        folder: Folder of the four files of the data set.
        role: What is trained and judged on.

    Raises:
        InputError: If a file is missing or damaged.
    """

    def __init__(self, folder: str, role: str) -> None:
        # For tuning, the test pictures are not touched.
        pictures, labels = read_images(folder, "train"), read_labels(folder, "train")
        if role == "tune":
            held_out, held_out_labels = pictures[-DEVELOPMENT_IMAGES:], labels[-DEVELOPMENT_IMAGES:]
            pictures, labels = pictures[:-DEVELOPMENT_IMAGES], labels[:-DEVELOPMENT_IMAGES]
        else:
            held_out, held_out_labels = read_images(folder, "t10k"), read_labels(folder, "t10k")

        self.pictures, self.labels = normalize(pictures), labels
        self.held_out, self.held_out_labels = normalize(held_out), held_out_labels

    def __len__(self) -> int:
        return len(self.labels)


class FashionMnist(ClassifyTask):
    """Classification of the pictures.

    Data settings: ``folder`` and ``role``, as ``FashionImages`` takes them.
    """

    has_readers: ClassVar[bool] = False  # pictures are in memory

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__({"classes": len(CLASSES)})
        self.images = FashionImages(data.get("folder", FOLDER), data.get("role", "confirm"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images.pictures[index], self.images.labels[index]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure top-1 and top-5 on the held-out pictures."""
        return self.accuracy(model, self.images.held_out, self.images.held_out_labels)

    def chance(self) -> float:
        """Return one in ten."""
        return 1 / len(CLASSES)


class FashionCaptions(ClipTask):
    """CLIP on the pictures, each with a caption from the name of its class and a random template.

    Data settings: ``folder`` and ``role``, as ``FashionImages`` takes them.
    """

    has_readers: ClassVar[bool] = False  # pictures are in memory

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(
            {"tokenizer": WORDS, "context_length": CONTEXT_LENGTH, "image_size": [SIZE, SIZE]}
        )
        self.images = FashionImages(data.get("folder", FOLDER), data.get("role", "confirm"))
        tokenize = WordTokenizer(WORDS, CONTEXT_LENGTH)
        prompts = [tokenize([t.format(name) for t in TEMPLATES]) for name in CLASSES]
        self.prompts = torch.stack(prompts)  # [classes, templates, length]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        template = int(torch.randint(len(TEMPLATES), ()))
        label = int(self.images.labels[index])
        picture = self.images.pictures[index].expand(3, -1, -1)  # open_clip wants three channels
        return picture, self.prompts[label, template][None]

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure zero-shot accuracy with all templates."""
        pictures = self.images.held_out.expand(-1, 3, -1, -1)
        return evaluate_zero_shot(model, pictures, self.images.held_out_labels, self.prompts)

    def chance(self) -> float:
        """Return one in ten."""
        return 1 / len(CLASSES)


def normalize(pictures: Tensor) -> Tensor:
    """Return pictures [n, 28, 28] in uint8 as float32 [n, 1, 28, 28] of mean 0 and deviation 1."""
    return ((pictures.float() / 255 - MEAN) / DEVIATION)[:, None]


def read_images(folder: str, part: str) -> Tensor:
    """Return the pictures [n, 28, 28], uint8, of ``train`` or ``t10k``."""
    values = read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz", header=16)
    return values.reshape(-1, SIZE, SIZE)


def read_labels(folder: str, part: str) -> Tensor:
    """Return the labels [n] of ``train`` or ``t10k``."""
    return read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz", header=8).long()


def read_idx(path: Path, header: int) -> Tensor:
    """Return the bytes of an idx file after its header.

    Raises:
        InputError: If it is missing or damaged.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read: {error}; install Debian's dataset-fashion-mnist, or give --data"
        ) from error
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).copy())
