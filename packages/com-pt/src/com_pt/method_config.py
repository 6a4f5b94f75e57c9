"""Settings of the method: a chain, its stages, and how a model is grown."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from effml_common.errors import ConfigError
from effml_common.parsing import require, setting

# Where ruff checks a default it knows the word Literal only, so fields spell these out.
GrowthMode = Literal["embed", "official", "lossless", "random"]
DepthRule = Literal["interleave", "stack", "identity", "leading"]
Cap = Literal["off", "warn", "scale"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Keep = Literal["last", "best"]

# Epochs of the second and of the last member as shares of the individual epochs: they fit the
# authors' 24 ... 15 of 128.
SECOND_MEMBER_SHARE, LAST_MEMBER_SHARE = 0.19, 0.12


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One member of the chain and how it is trained.

    Args:
        model: What ``Task.build`` takes: a model's name, a file or the settings themselves.
        init_from: Folder of a finished model to take instead of training (first member only).
    """

    name: str
    model: Any
    epochs: float | None = setting(None, "passes over the data; fractions are allowed")
    warmup_steps: int = setting(1000, "linear warm-up, at most a tenth of the stage")
    lr: float = setting(1e-3, "peak learning rate of AdamW")
    individual_lr: float | None = setting(
        None, "peak rate of the member trained alone; none: the first member's lr"
    )
    weight_decay: float = setting(0.1, "not for norms, biases and scales")
    batch_size: int = setting(1024, "samples per update, over all processes")
    growth: Literal["embed", "official", "lossless", "random"] = setting(
        "embed", "embed, official, lossless or random"
    )
    depth: Literal["interleave", "stack", "identity", "leading"] | None = setting(
        None, "interleave, stack, identity or leading"
    )
    feature_weight: float = setting(1.953, "lambda = 2 alpha / D of the feature loss; 0 is off")
    init_from: str | None = None

    def __post_init__(self) -> None:
        # Numbers in range.
        require(
            bool(self.name) and "/" not in self.name,
            f"the name is {self.name!r}",
            "give a word without a slash",
        )
        is_length = self.epochs is None or 0 < self.epochs < math.inf
        require(is_length, f"epochs are {self.epochs}", "give more than 0")
        require(0 < self.lr < math.inf, f"lr is {self.lr}", "try 1e-3")
        alone = self.individual_lr
        require(alone is None or 0 < alone < math.inf, f"individual_lr is {alone}", "try 1e-3")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "give 1 or more")
        decay = self.weight_decay
        require(0 <= decay < math.inf, f"weight_decay is {decay}", "give 0 or more")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}", "give 0 or more")
        require(
            0 <= self.feature_weight < math.inf,
            f"feature_weight is {self.feature_weight}",
            "give 0, which is off, or more",
        )

        # One of a few words.
        _require_choice("growth", self.growth, get_args(GrowthMode))
        _require_choice("depth", self.depth, (*get_args(DepthRule), None))


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A family, from small to large, and what all its stages share.

    Args:
        task: ``clip``, ``classify``, ``causal-lm`` or ``module:Class`` of a task of your own.
        stages: The members, from small to large.
        data: Settings of the task's data.

    Example:
        >>> stages = [StageConfig(name="T", model="vit_tiny_patch16_224"),
        ...           StageConfig(name="S", model="vit_small_patch16_224")]
        >>> chain = ChainConfig(task="classify", stages=tuple(stages), individual_epochs=100)
        >>> [chain.epochs_of(i) for i in range(2)]
        [100, 19]
    """

    task: str
    stages: tuple[StageConfig, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    individual_epochs: float = setting(128, "epochs of a member that is trained alone")
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "fp32, bf16 or fp16; auto: bf16 on a card, else fp32"
    )
    compile: bool = setting(False, "compile both models' forward passes with torch.compile")
    accum_freq: int = setting(
        1, "micro-batches per update; contrastive losses see them all at once"
    )
    grad_checkpointing: bool = False
    shard: bool = setting(
        False, "spread weights and optimizer over processes (FSDP2) instead of copying them (DDP)"
    )
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    lr_floor: float = setting(3e-6, "where the cosine ends")
    cap: Literal["off", "warn", "scale"] = setting(
        "off", "warn about, or scale down, a feature loss above the task loss"
    )
    projector: bool = setting(True, "add a linear map where the members' feature widths differ")
    allow_weak: bool = setting(False, "no warning about a predecessor at chance level")
    resize_pos: bool = setting(False, "interpolate positions when the image size changes")
    workers: int | None = setting(None, "processes that read data; none: by the CPUs, at most 8")
    eval_every: int = setting(0, "updates between evaluations; 0: at the start and end of a stage")
    keep: Literal["last", "best"] = setting(
        "last", "model that a stage hands over: the last, or the best evaluated one"
    )
    save_every: int = setting(500, "updates between checkpoints")
    log_every: int = setting(20, "updates between lines of metrics.jsonl")
    published_ratio: float | None = setting(
        None, "how many times cheaper the authors say the chain is; plan prints it beside its own"
    )

    def __post_init__(self) -> None:
        # Each stage has a folder of its own beside the folder "run".
        require(bool(self.stages), "the chain has no stages", "list at least one under stages")
        names = [stage.name for stage in self.stages]
        require(len({*names}) == len(names), f"stage names {names} repeat", "name each once")
        require("run" not in names, "a stage is named run", "use another name")

        # The data's settings; their values are checked by the task.
        require(
            isinstance(self.data, Mapping),
            f"data is {self.data!r}",
            "give settings such as {train: captions.tsv}",
        )

        # Numbers in range, and one of a few words.
        is_length = 0 < self.individual_epochs < math.inf
        require(is_length, f"individual_epochs are {self.individual_epochs}", "give more than 0")
        for name in ("accum_freq", "save_every", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")
        _require_choice("precision", self.precision, get_args(Precision))
        _require_choice("cap", self.cap, get_args(Cap))
        _require_choice("keep", self.keep, get_args(Keep))
        require(self.eval_every >= 0, f"eval_every is {self.eval_every}", "give 0 or more")
        in_range = all(0 <= beta < 1 for beta in self.betas)
        require(in_range, f"betas are {list(self.betas)}", "give two numbers from 0 to below 1")
        require(0 <= self.eps < math.inf, f"eps is {self.eps}", "try 1e-6")
        require(0 <= self.lr_floor < math.inf, f"lr_floor is {self.lr_floor}", "try 3e-6")

        require_readers(self.workers)

        # Settings that exclude one another.
        fp16_shards = self.shard and self.precision == "fp16"
        require(not fp16_shards, "shard with fp16 is not supported", "use bf16")
        has_best = self.keep == "last" or self.eval_every > 0
        require(has_best, "keep is best and nothing is evaluated", "set eval_every")
        compiled_shards = self.shard and self.compile
        require(not compiled_shards, "shard with compile is not supported", "set one to false")
        for stage in self.stages[1:]:
            require(
                stage.init_from is None, f"{stage.name} has init_from", "give it to the first only"
            )

    def epochs_of(self, index: int) -> float:
        """Return a stage's epochs.

        They are its own, or follow the linear rule between 0.19 and 0.12 of the individual epochs.
        """
        own = self.stages[index].epochs
        if own is not None:
            return own
        if index == 0:
            return self.individual_epochs
        later = len(self.stages) - 1
        first, last = SECOND_MEMBER_SHARE, LAST_MEMBER_SHARE
        share = first if later == 1 else first + (last - first) * (index - 1) / (later - 1)
        return math.ceil(share * self.individual_epochs - 1e-9)

    def individual(self, member: str) -> "ChainConfig":
        """Return the chain of one member alone, with the individual epochs: the fair baseline.

        Its rate is ``individual_lr``, or that of the first member, which is trained alone as well; never
        one that a later stage has for a start from its predecessor.

        Raises:
            ConfigError: If there is no such member.
        """
        names = [stage.name for stage in self.stages]
        if member not in names:
            raise ConfigError(f"there is no member {member}; use one of {', '.join(names)}")
        first, stage = self.stages[0], self.stages[names.index(member)]
        alone = replace(
            stage,
            epochs=self.individual_epochs,
            init_from=None,
            lr=first.lr if stage.individual_lr is None else stage.individual_lr,
            warmup_steps=first.warmup_steps,
        )
        return replace(self, stages=(alone,))

    def digest(self) -> str:
        """Return a hash of 16 hex digits that changes with any setting."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class GrowthSettings:
    """How one model is grown from another.

    Args:
        mode: ``embed`` leading entries per role; ``official`` the released code's top-left blocks;
            ``lossless`` the same outputs as before; ``random`` nothing.
        depth: Which source layer a target layer takes. None is ``identity`` for ``lossless``, the
            released code's own rule for ``official``, and ``interleave`` for the others.
        strict: Refuse depths that are no multiple instead of rounding down.
        seed: The seed of the uneven split of ``lossless``.
        allow_missing: Name patterns (``*`` is any text) that may be missing, and stay fresh.
    """

    mode: GrowthMode = "embed"
    depth: DepthRule | None = None
    strict: bool = False
    seed: int = 0
    allow_missing: Sequence[str] = ()

    @property
    def depth_rule(self) -> DepthRule | Literal["released"]:
        """The depth rule after defaults; ``released`` differs from stack to stack."""
        if self.depth is not None:
            return self.depth
        if self.mode == "official":
            return "released"
        return "identity" if self.mode == "lossless" else "interleave"


def _require_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    require(value in allowed, f"{name} is {value}", f"use one of {', '.join(map(str, allowed))}")


def require_readers(workers: int | None) -> None:
    """Refuse a negative number of reader processes; None leaves it to the CPUs.

    Raises:
        ConfigError: If it is negative.
    """
    require(workers is None or workers >= 0, f"workers is {workers}", "give 0 or more")
