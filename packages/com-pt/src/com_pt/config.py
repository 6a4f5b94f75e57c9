"""Settings of the commands; those of a chain are in ``com_pt.chain``."""

from dataclasses import dataclass, field
from typing import Literal

from effml_common.device import DEVICE_HELP
from effml_common.settings import require, setting


def _chain() -> str:
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
    depth: Literal["interleave", "stack", "identity"] | None = setting(
        None, "source of new layers; default identity for lossless, else interleave"
    )
    strict: bool = setting(False, "refuse a depth that is no multiple")
    resize_pos: bool = setting(False, "interpolate positions if the image size differs")
    allow_missing: tuple[str, ...] = setting((), "name patterns that may be missing and stay fresh")
    seed: int = setting(0, "of the fresh weights and the uneven split")
    device: str = setting("auto", DEVICE_HELP)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What a chain would cost, from shapes alone."""

    chain: str = _chain()


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """What a run has cost so far, beside its plan."""

    run: str = field(metadata={"help": "out folder of train"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a chain: every member grows from, and is guided by, the one before it.

    Several processes: accelerate launch -m com_pt.cli train ..., or torchrun in its place.
    """

    chain: str = _chain()
    out: str | None = setting(None, "folder of the members; default runs/train-<time>")
    train_data: str | None = setting(None, "replaces data: train of the chain file")
    val_data: str | None = setting(None, "replaces data: val")
    precision: Literal["fp32", "bf16", "fp16"] | None = setting(None, "replaces precision")
    accum_freq: int | None = setting(None, "replaces accum_freq, micro-batches per update")
    grad_checkpointing: bool | None = setting(None, "replaces grad_checkpointing")
    device: str = setting("auto", DEVICE_HELP)
    resume: Literal["never", "auto"] = setting(
        "never", "auto continues an interrupted run in the same --out"
    )
    force: bool = setting(False, "resume although settings changed")


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
        (), "CSV, TSV or tar of captions; CSV of path and class or label; or text files"
    )
    train: str | None = setting(None, "probe: CSV of path and class to fit on")
    images: str | None = setting(None, "folder that paths are relative to")
    classes: str | None = setting(None, "zero-shot: text or JSON file of class names")
    templates: str | None = setting(None, "zero-shot: file of templates with {}")
    tokenizer: str = setting("simple", "simple (open_clip), bytes, or a tokenizer's folder")
    length: int = setting(512, "perplexity: tokens of a block")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        require(bool(self.data), "there are no data to judge on", "give --data FILE")
        if self.suite == "zero-shot":
            both = self.classes is not None and self.templates is not None
            require(both, "zero-shot needs class names", "give --classes and --templates")
        if self.suite == "probe":
            require(self.train is not None, "a probe needs data to fit", "give --train FILE")


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
        require(self.seeds >= 1, f"seeds must be 1 or more, got {self.seeds}", "use 3 for claims")
        require(self.steps >= 20, f"steps must be 20 or more, got {self.steps}", "use 400")
