"""A chain: its stages and settings, and the YAML they are written in."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from com_pt.errors import ChainOrderError
from com_pt.growth import Depth, Mode
from effml_common.errors import ConfigError, InputError
from effml_common.parsing import did_you_mean, one_line
from effml_common.settings import require, setting

RECIPES = Path(__file__).parent / "recipes"
FIRST, LAST = 0.19, 0.12  # shares of the individual epochs that fit the authors' 24 ... 15 of 128
Cap = Literal["off", "warn", "scale"]
Precision = Literal["fp32", "bf16", "fp16"]


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
    weight_decay: float = setting(0.1, "not for norms, biases, scales and positions")
    batch_size: int = setting(1024, "samples per update, over all processes")
    growth: Literal["embed", "official", "lossless", "random"] = setting(
        "embed", "embed, official, lossless or random"
    )
    depth: Literal["interleave", "stack", "identity"] | None = setting(
        None, "interleave, stack or identity"
    )
    feature_weight: float = setting(1.953, "lambda = 2 alpha / D of the feature loss; 0 is off")
    init_from: str | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name, f"the name is {self.name!r}", "use a word"
        )
        require(self.epochs is None or self.epochs > 0, f"epochs are {self.epochs}", "give more")
        require(0 < self.lr < math.inf, f"lr is {self.lr}", "try 1e-3")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "give 1 or more")
        require(self.feature_weight >= 0, f"feature_weight is {self.feature_weight}", "0 is off")
        for name, allowed in (("growth", get_args(Mode)), ("depth", (*get_args(Depth), None))):
            value = getattr(self, name)
            choice = f"use one of {', '.join(map(str, allowed))}"
            require(value in allowed, f"{name} is {value}", choice)


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A family, from small to large, and what all its stages share.

    Args:
        task: ``clip``, ``classify``, ``causal-lm`` or ``module:Class`` of a task of your own.
        stages: From small to large.
        data: Settings of the task's data.
    """

    task: str
    stages: tuple[StageConfig, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    individual_epochs: float = setting(128, "epochs of a member that is trained alone")
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "fp32, bf16 or fp16")
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
    workers: int = setting(0, "processes that read data")
    save_every: int = setting(500, "updates between checkpoints")
    log_every: int = setting(20, "updates between lines of metrics.jsonl")

    def __post_init__(self) -> None:
        require(bool(self.stages), "the chain has no stages", "list at least one under stages")
        names = [stage.name for stage in self.stages]
        require(len({*names}) == len(names), f"stage names {names} repeat", "name each once")
        require("run" not in names, "a stage is named run", "use another name")
        for name in ("accum_freq", "save_every", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}", "give 1 or more")
        for name, allowed in (("precision", get_args(Precision)), ("cap", get_args(Cap))):
            value = getattr(self, name)
            require(value in allowed, f"{name} is {value}", f"use one of {', '.join(allowed)}")
        require(
            not (self.shard and self.precision == "fp16"), "shard with fp16 is not supported",
            "use bf16",
        )  # fmt: skip
        for stage in self.stages[1:]:
            require(stage.init_from is None, f"{stage.name} has init_from", "only the first may")

    def epochs_of(self, index: int) -> float:
        """Epochs of a stage: its own, or the linear rule between 0.19 and 0.12 of the individual."""
        own = self.stages[index].epochs
        if own is not None:
            return own
        if index == 0:
            return self.individual_epochs
        later = len(self.stages) - 1
        share = FIRST if later == 1 else FIRST + (LAST - FIRST) * (index - 1) / (later - 1)
        return math.ceil(share * self.individual_epochs - 1e-9)

    def individual(self, member: str) -> "ChainConfig":
        """The chain of one member alone, with the individual epochs: the fair baseline.

        Raises:
            ConfigError: If there is no such member.
        """
        names = [stage.name for stage in self.stages]
        if member not in names:
            raise ConfigError(f"there is no member {member}; use one of {', '.join(names)}")
        stage = self.stages[names.index(member)]
        alone = replace(stage, epochs=self.individual_epochs, init_from=None)
        if names.index(member) > 0:  # alone it warms up as long as the first member does
            alone = replace(alone, warmup_steps=self.stages[0].warmup_steps)
        return replace(self, stages=(alone,))

    def digest(self) -> str:
        """A hash that changes with any setting."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_chain(path: str | Path) -> ChainConfig:
    """Read a chain from YAML, or a recipe of the package by its name.

    Settings of a stage that stand outside ``stages`` hold for all stages.

    Raises:
        InputError: If the file cannot be read.
        ConfigError: If a setting is unknown, missing or out of range.
    """
    import yaml

    file = Path(path)
    recipe = RECIPES / f"{path}.yaml"
    if not file.exists() and recipe.exists():
        file = recipe
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise InputError(
            f"{path} cannot be read as YAML: {one_line(str(error))}; "
            f"give a chain file or one of {known}"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("stages"), list):
        raise ConfigError(f"{path} has no list of stages; see the README for a chain file")
    return chain_of(document)


def chain_of(document: Mapping[str, Any]) -> ChainConfig:
    """A chain from the content of its file.

    Raises:
        ConfigError: If a setting is unknown, missing, of the wrong type or out of range.
    """
    of_stage = {f.name for f in fields(StageConfig)}
    common = {k: v for k, v in document.items() if k in of_stage}
    rest = {k: v for k, v in document.items() if k not in of_stage and k != "stages"}
    stages = tuple(_made(StageConfig, {**common, **stage}) for stage in document["stages"])
    return _made(ChainConfig, {**rest, "stages": stages})


def _made(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = get_type_hints(kind)
    converted = {}
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(name, list(known), f"use one of {', '.join(known)}")
            raise ConfigError(f"there is no setting {name}; {hint}")
        converted[name] = _converted(name, value, known[name])
    try:
        return kind(**converted)
    except TypeError as error:
        raise ConfigError(f"{one_line(str(error))}; see the README for a chain file") from error


def _converted(name: str, value: Any, hint: Any) -> Any:
    """YAML reads 1e-3 as text; counts and rates must be numbers."""
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    if name == "betas":
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"betas are {value!r}; give two numbers, such as [0.9, 0.98]")
        return tuple(_converted("a beta", item, float) for item in value)
    for kind in (float, int):
        if kind in allowed and value is not None:
            try:
                number = kind(value)
                if isinstance(value, bool) or number != float(value):
                    raise ValueError
                return number
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(f"{name} is {value!r}; give a number") from None
    if bool in allowed and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; give true or false")
    return value


def check_order(names: list[str], sizes: list[int]) -> None:
    """Refuse members that do not ascend.

    Raises:
        ChainOrderError: Naming the first pair that does not.
    """
    for i in range(1, len(names)):
        if sizes[i] < sizes[i - 1]:
            raise ChainOrderError(
                f"{names[i]} has {sizes[i]:,} parameters, fewer than {names[i - 1]} with "
                f"{sizes[i - 1]:,}; order the chain from small to large"
            )
