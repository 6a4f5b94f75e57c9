"""Contrastive image-text pre-training with open_clip models."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from com_pt.adapters.flop_counter import count_macs
from com_pt.adapters.open_clip_models import build_clip, clip_config, load_clip, save_clip
from com_pt.method.cost import clip_macs
from com_pt.method.losses import multi_caption_clip_loss
from com_pt.method.metrics import class_embeddings, name_accuracies, zero_shot_ranks
from com_pt.training.data.captions import (
    CaptionData,
    StreamedCaptionData,
    caption_transform,
    is_streamed,
)
from com_pt.training.data.counts import check_settings, read_count
from com_pt.training.data.labelled import LabelledImages, open_labelled
from com_pt.training.data.stream import ShardStream
from com_pt.training.data.tokenizers import make_tokenizer, vocabulary_size
from com_pt.training.embedding import encode_pictures, encode_texts, evaluate_retrieval
from com_pt.training.streaming import Reading
from com_pt.training.tasks.base import Task, height_and_width
from com_pt.training.tasks.zero_shot import (
    make_prompts,
    read_classes,
    read_labels,
    read_templates,
)
from effml_common.errors import ConfigError

LARGEST_LOGIT_SCALE = math.log(100)  # of the parameter, which is exponentiated


class ClipTask(Task):
    """CLIP on image-caption pairs.

    Data settings: ``train`` and ``val`` (CSV, TSV, WebDataset tars or a data set of Hugging Face with
    ``image_key`` and ``caption_key``), ``images`` (folder that paths are relative to), ``captions`` (K,
    drawn anew each time), ``sentences`` (all but the first are sentences), ``stream`` (tars one after
    the other), ``samples`` of an epoch and ``shuffle_buffer`` for it, ``tokenizer`` (``simple``, a
    list of words or a Hugging Face tokenizer's folder), ``crop_scale``, ``image_size``,
    ``context_length``, ``zero_shot`` (``images``: CSV of path and class, class folders or data set;
    ``classes``, or ``imagenet``; ``templates`` with ``{}``, or ``imagenet``, ``openai``, ``simple``),
    ``val_batch`` and ``val_workers`` of the evaluation, ``local_loss`` and ``gather_with_grad``
    (``multi_caption_clip_loss``).
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "train",
            "val",
            "images",
            "image_key",
            "caption_key",
            "tokenizer",
            "captions",
            "sentences",
            "stream",
            "samples",
            "shuffle_buffer",
            "crop_scale",
            "zero_shot",
            "image_size",
            "context_length",
            "val_batch",
            "val_workers",
            "local_loss",
            "gather_with_grad",
        }
    )
    streams: ClassVar[tuple[str, ...]] = ("image", "text")
    couples_samples: ClassVar[bool] = True
    has_readers: ClassVar[bool] = True
    headline: ClassVar[str] = "zero-shot top-1"

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        check_settings(data)
        self.captions = read_count(data, "captions", 1)
        if data.get("sentences") and self.captions < 2:
            raise ConfigError(
                f"captions is {self.captions}, and sentences come beside the raw caption; "
                "set captions: 7, as the paper does, or 2 at least"
            )
        self._samples: CaptionData | StreamedCaptionData | None = None

    def adopt(self, specs: Mapping[str, Any]) -> None:
        """Take image size and context length of the models, unless the data settings have them."""
        # Sizes of the data.
        configs = {name: clip_config(spec) for name, spec in specs.items()}
        for key, section, usual in (
            ("image_size", "vision_cfg", 224),
            ("context_length", "text_cfg", 77),
        ):
            self.adopt_size(key, {n: c[section].get(key, usual) for n, c in configs.items()})

        # Every token id must have an embedding.
        tokens = vocabulary_size(self.data)
        for name, config in configs.items():
            vocab_size = config["text_cfg"].get("vocab_size", 49408)
            if vocab_size < tokens:
                raise ConfigError(
                    f"vocab_size of {name} is {vocab_size} and the tokenizer has {tokens} tokens; "
                    "raise it or set data: tokenizer"
                )

    @property
    def samples(self) -> CaptionData | StreamedCaptionData:
        """The training pairs, opened at first use."""
        if self._samples is None:
            if is_streamed(self.data):
                self._samples = StreamedCaptionData.open(self.data, captions=self.captions)
            else:
                idle = next(
                    (name for name in ("samples", "shuffle_buffer") if name in self.data), None
                )
                if idle is not None and self.data.get("stream") is None:
                    raise ConfigError(
                        f"{idle} is {self.data[idle]}, but the training data are not streamed; "
                        "leave it out or set stream: true"
                    )
                self._samples = CaptionData.open(self.data, "train", captions=self.captions)
        return self._samples

    @property
    def stream(self) -> ShardStream | None:
        """The shards that the training pairs are streamed from; None where they have numbers."""
        if not is_streamed(self.data):
            return None
        return cast(StreamedCaptionData, self.samples).stream

    def check_data(self) -> None:
        """Open the held-out data and decode an image of each.

        Raises:
            InputError: If they cannot be read, or a class or template is wrong.
        """
        if "val" in self.data:
            CaptionData.open(self.data, "val", captions=None).image(0)
        if "zero_shot" in self.data:
            self.open_zero_shot().image(0)
            read_templates(self.data["zero_shot"]["templates"])

    def open_zero_shot(self) -> LabelledImages:
        """Open the images of ``zero_shot`` with their classes.

        Raises:
            InputError: If a setting or file is missing, or a class is not listed.
        """
        settings = self.data["zero_shot"]
        for name in ("images", "classes", "templates"):
            if not settings.get(name):
                raise ConfigError(f"zero_shot has no {name}; set data: zero_shot: {name}")
        keys = {key: self.data.get(key) for key in ("images", "image_key")}
        data = {**keys, "val": settings["images"], "classes": read_labels(settings["classes"])}
        return open_labelled(data, "val", caption_transform(self.data, "val"))

    def build(self, spec: Any) -> nn.Module:
        """Build an open_clip model with class ``CLIP`` or ``CustomTextCLIP``."""
        return build_clip(clip_config(spec))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def features(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Return unit embeddings: image [b, d], text [b, k, d]; the scale, exponentiated."""
        image, text = batch
        images, captions, length = text.shape
        flat = text.reshape(images * captions, length)
        text_features = model.encode_text(flat, normalize=True)
        outputs = {
            "image": model.encode_image(image, normalize=True),
            "text": text_features.reshape(images, captions, -1),
            "logit_scale": model.logit_scale.exp().reshape(()),
        }
        bias = getattr(model, "logit_bias", None)
        return outputs if bias is None else {**outputs, "logit_bias": bias.reshape(())}

    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the contrastive loss over all captions."""
        value = multi_caption_clip_loss(
            outputs["image"],
            outputs["text"],
            outputs["logit_scale"],
            outputs.get("logit_bias"),
            local_loss=bool(self.data.get("local_loss", False)),
            gather_with_grad=bool(self.data.get("gather_with_grad", True)),
        )
        return {"contrastive": value}

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        """Keep the logit scale in [1, 100]."""
        model.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure zero-shot accuracy and retrieval, as far as there is data for them."""
        metrics: dict[str, float] = {}
        reading = Reading.of(self.data, model)
        if "zero_shot" in self.data:
            metrics |= self._zero_shot(model, self.data["zero_shot"], reading)
        if "val" in self.data:
            held_out = CaptionData.open(self.data, "val", captions=None)
            metrics |= evaluate_retrieval(model, held_out, reading)
        return metrics

    def chance(self) -> float | None:
        """Return the chance of zero-shot classification."""
        if "zero_shot" not in self.data:
            return None
        return 1 / len(read_classes(self.data["zero_shot"]["classes"]))

    def _zero_shot(
        self, model: Any, settings: Mapping[str, Any], reading: Reading
    ) -> dict[str, float]:
        # A class is the mean of all its prompts.
        names, templates = read_classes(settings["classes"]), read_templates(settings["templates"])
        prompts, tokenize = make_prompts(names, templates), make_tokenizer(self.data)
        prompt_features = encode_texts(model, prompts, tokenize, reading, "prompts")
        class_features = class_embeddings(prompt_features, len(templates))

        # Each image belongs to the nearest class.
        held_out = self.open_zero_shot()
        image_features = encode_pictures(model, held_out, reading)
        ranks = zero_shot_ranks(image_features, class_features, held_out.labels)
        return name_accuracies(ranks, len(names), "zero-shot ")

    def macs(self, spec: Any) -> int:
        """Return the forward MACs of the image tower plus K times the text tower."""
        config = clip_config(spec)
        vision = config["vision_cfg"]
        if "timm_model_name" not in vision:
            return clip_macs(config, self.captions)
        image = torch.zeros(1, 3, *height_and_width(vision.get("image_size", 224)))
        text = torch.zeros(1, self.captions, config["text_cfg"].get("context_length", 77)).long()
        return count_macs(lambda: self.build(spec), self.features, (image, text))

    def save(self, model: nn.Module, spec: Any, folder: Path) -> None:
        """Write an ``open_clip.create_model("local-dir:...")`` folder."""
        save_clip(model, clip_config(spec), folder)

    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model of such a folder."""
        return load_clip(folder)
