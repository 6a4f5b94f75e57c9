"""Settings of the commands: the one home of their defaults, units and validation."""

import math
from dataclasses import dataclass, field
from typing import Literal

from com_pt.method_config import require_readers
from effml_common.device import DEVICE_HELP
from effml_common.logging import SINK_HELP
from effml_common.parsing import require, setting


def _chain_setting() -> str:
    return field(metadata={"help": "chain file (YAML), or a recipe such as cc3m-vit-tsbl"})


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowConfig:
    """Make a larger model that starts from a finished smaller one.

    LARGE is of the same library as SMALL: a model's name, or a JSON file of its settings. The result
    is a folder that the library loads.
    """

    small: str = field(
        metadata={
            "help": "folder of an open_clip, timm or Llama model; or a checkpoint file of open_clip, "
            "with --small-model"
        }
    )
    large: str = field(metadata={"help": "name or JSON file of the larger model"})
    out: str | None = setting(None, "folder of the grown model; default runs/grow-<time>")
    small_model: str | None = setting(None, "open_clip name or JSON of SMALL, if it is a file")
    mode: Literal["embed", "official", "lossless", "random"] = setting(
        "embed",
        "embed: leading channels, heads kept whole; official: the released code's corner blocks; "
        "lossless: the same outputs; random: nothing",
    )
    depth: Literal["interleave", "stack", "identity", "leading"] | None = setting(
        None,
        "source of new layers; default identity for lossless, as released for official, "
        "else interleave",
    )
    strict: bool = setting(False, "refuse a depth that is no multiple")
    resize_pos: bool = setting(False, "interpolate positions if the image size differs")
    allow_missing: tuple[str, ...] = setting((), "name patterns that may be missing and stay fresh")
    seed: int = setting(0, "of the fresh weights and the uneven split")
    device: str = setting("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What a chain would cost, from shapes alone."""

    chain: str = _chain_setting()


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """What a run has cost so far, beside its plan."""

    run: str = field(metadata={"help": "out folder of train"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a chain: every member grows from, and is guided by, the one before it.

    Several processes: accelerate launch -m com_pt train ..., or torchrun in its place.
    """

    chain: str = _chain_setting()
    out: str | None = setting(None, "folder of the members; default runs/<command>-<time>")
    train_data: str | None = setting(None, "replaces data: train of the chain file")
    val_data: str | None = setting(None, "replaces data: val")
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = setting(None, "replaces precision")
    accum_freq: int | None = setting(None, "replaces accum_freq, micro-batches per update")
    grad_checkpointing: bool | None = setting(None, "replaces grad_checkpointing")
    device: str = setting("auto", DEVICE_HELP)
    resume: Literal["never", "auto"] = setting(
        "never", "auto continues an interrupted run in the same --out"
    )
    force: bool = setting(False, "resume although settings changed")
    sink: str | None = setting(None, SINK_HELP)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndividualConfig(TrainConfig):
    """Train one member alone, by the same code: the baseline of a chain."""

    member: str = setting("", "name of the stage to train")

    def __post_init__(self) -> None:
        require(bool(self.member), "no member is named", "give --member NAME")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Judge a finished model on your own data."""

    model: str = field(metadata={"help": "folder of a member"})
    suite: Literal["zero-shot", "retrieval", "probe", "top1", "perplexity"] = setting(
        "retrieval", "zero-shot, retrieval and probe for CLIP; top1 for timm; perplexity for Llama"
    )
    data: tuple[str, ...] = setting(
        (), "captions (CSV, TSV, tar), labelled images (CSV, class folders, hf:NAME) or text files"
    )
    train: str | None = setting(None, "probe: labelled images to fit on")
    decay: float | None = setting(
        None, "probe: L2 penalty; default the best on a held-out fifth of the training data"
    )
    images: str | None = setting(None, "folder that paths are relative to")
    classes: str | None = setting(
        None, "zero-shot, top1: text or JSON file of class names, or imagenet (open_clip's 1,000)"
    )
    templates: str | None = setting(
        None, "zero-shot: file of templates with {}, or imagenet = openai (80) or simple (7)"
    )
    tokenizer: str = setting(
        "simple",
        "simple (open_clip), bytes, or a tokenizer's folder; a Llama has by default the one in its "
        "folder, else bytes",
    )
    length: int = setting(512, "perplexity: tokens of a block")
    batch_size: int | None = setting(
        None, "items of a forward pass; default 256, and 16 for perplexity"
    )
    workers: int | None = setting(
        None, "processes that read images; default 0 for small sets, else by the CPUs, at most 8"
    )
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require(bool(self.data), "there are no data to judge on", "give --data FILE")
        if self.suite == "zero-shot":
            has_words = self.classes is not None and self.templates is not None
            require(has_words, "zero-shot needs class names", "give --classes and --templates")
        if self.suite == "probe":
            require(self.train is not None, "a probe needs data to fit", "give --train FILE")
            is_penalty = self.decay is None or 0 <= self.decay < math.inf
            require(is_penalty, f"decay is {self.decay}", "give 0 or more")

        # How data are read.
        batch = self.batch_size
        require(batch is None or batch >= 1, f"batch_size is {batch}", "give 1 or more")
        require_readers(self.workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Train a finished image model on labelled images with a new head; eval --suite top1 judges it."""

    model: str = field(metadata={"help": "folder of a timm model or of a CLIP"})
    train: str | None = setting(None, "labelled images: CSV, class folders or hf:NAME")
    data: str | None = setting(None, "held-out images, judged once at the end")
    images: str | None = setting(None, "folder that paths are relative to")
    out: str | None = setting(None, "folder of the result; default runs/finetune-<time>")
    epochs: float = setting(10, "passes over the data; fractions are allowed")
    lr: float = setting(
        1e-4, "peak learning rate of AdamW, after a tenth of warm-up; then a cosine"
    )
    weight_decay: float = setting(0.05, "not for norms, biases, tokens and positions")
    batch_size: int = setting(128, "images per update, over all processes")
    smoothing: float = setting(0.1, "label smoothing")
    crop: float = setting(
        0.35, "smallest share of an image that a random crop keeps; 1 for no crops"
    )
    flip: bool = setting(True, "mirror images at random; not for digits or letters")
    freeze: bool = setting(False, "train the head alone")
    precision: Literal["fp32", "bf16", "fp16"] | None = setting(
        None, "default bf16 on CUDA, else fp32"
    )
    workers: int | None = setting(
        None, "processes that read images; default by the CPUs, at most 8"
    )
    seed: int = setting(0, "of order and augmentation")
    device: str = setting("auto", DEVICE_HELP)
    resume: Literal["never", "auto"] = setting(
        "never", "auto continues an interrupted run in the same --out"
    )
    force: bool = setting(False, "resume although settings changed")

    def __post_init__(self) -> None:
        require(self.train is not None, "there are no data to train on", "give --train FOLDER")
        require(self.data is not None, "there are no data to judge on", "give --data FOLDER")
        in_range = 0 <= self.smoothing < 1
        require(in_range, f"smoothing is {self.smoothing}", "give 0 or more, and less than 1")
        require(0 < self.crop <= 1, f"crop is {self.crop}", "give more than 0, and 1 at most")
        require_readers(self.workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """A model's axes, sizes and cost, from its settings alone."""

    model: str = field(metadata={"help": "CLIP name or JSON file, or timm name"})
    family: Literal["clip", "timm"] = setting("clip", "clip or timm")
    captions: int = setting(1, "clip: captions of an image, for the cost")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Three small CLIP models on pairs of digits: chain, and its parts, against training alone."""

    seeds: int = setting(1, "seeds of initialisation and order; claims need 3")
    steps: int = setting(400, "updates of the first member, and of individual training")
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds is {self.seeds}", "give 1 or more, 3 for claims")
        require(self.steps >= 20, f"steps is {self.steps}", "give 20 or more, such as 400")
