"""The paper's training strategies, one YAML file each in ``recipes``."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from scalekd.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is optimised.

    Attributes:
        batch_size: Images per update over all processes.
        decay_all: Weight decay on norms and biases too (SGD and LAMB recipes).
        schedule: ``cosine`` to ``min_lr``, or ``multistep`` by 0.1 at the ``milestones`` (epochs).
        warmup_factor: Start of the warm-up over the peak rate.
        loss: ``ce`` with ``smoothing``, or ``bce-sum``: binary, summed over classes.
        auto_augment: timm's name; empty for none.
        erase: Probability of random erasing.
        clip: Largest gradient norm; 0 for none.
        ema: Decay of the averaged weights; 0 for none.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "lamb", "adamw"]
    lr: float
    weight_decay: float
    decay_all: bool
    schedule: Literal["cosine", "multistep"]
    interpolation: str
    momentum: float = 0.9
    milestones: tuple[int, ...] = ()
    warmup_epochs: int = 0
    warmup_factor: float = 1.0
    min_lr: float = 0.0
    loss: Literal["ce", "bce-sum"] = "ce"
    smoothing: float = 0.0
    auto_augment: str = ""
    erase: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    sync_bn: bool = False


def load_recipe(name: str) -> Recipe:
    """A recipe of the package."""
    text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    values["milestones"] = tuple(values.get("milestones", ()))
    return Recipe(**values)


def recipe_of(config: TrainConfig) -> Recipe:
    """The recipe with what the command line overrides."""
    recipe = load_recipe(config.recipe)
    names = {field.name for field in fields(Recipe)}
    given = {name: getattr(config, name, None) for name in names}
    own = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if config.scale_lr:
        own = replace(own, lr=own.lr * own.batch_size / recipe.batch_size)
    if own.schedule == "multistep" and config.epochs:
        scaled = (round(m * own.epochs / recipe.epochs) for m in recipe.milestones)
        own = replace(own, milestones=tuple(sorted({max(1, m) for m in scaled})))
    return replace(own, warmup_epochs=min(own.warmup_epochs, own.epochs // 5))


class TaskLoss(nn.Module):
    """Cross entropy with smoothing, or binary cross entropy summed over classes.

    Takes labels [b], or soft ones [b, k] as mixup makes them.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.smoothing = recipe.loss, recipe.smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch."""
        if self.kind == "ce":
            return nn.functional.cross_entropy(
                logits.float(), target, label_smoothing=self.smoothing
            )
        if target.ndim == 1:
            target = nn.functional.one_hot(target, logits.shape[-1])
        every = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), target.to(torch.float32), reduction="none"
        )
        # The class mean would make this term as many times weaker beside the features as there are
        # classes.
        return every.sum(dim=-1).mean()
