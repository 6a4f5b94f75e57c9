"""The paper's training strategies, one YAML file each in ``recipes``."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from scalekd.config import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is optimised.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per update over all processes.
        optimizer: timm's name.
        lr: Peak learning rate.
        weight_decay: Of the optimizer.
        decay_all: Weight decay on norms and biases too (SGD and LAMB recipes).
        schedule: ``cosine`` to ``min_lr``, or ``multistep`` by 0.1 at the ``milestones`` (epochs).
        interpolation: How crops are resized.
        momentum: Of SGD.
        warmup_epochs: Epochs from the start of the warm-up to the peak rate.
        warmup_factor: Start of the warm-up over the peak rate.
        loss: ``ce`` with ``smoothing``, or ``bce-sum``: binary, summed over classes.
        auto_augment: timm's name; empty for none.
        erase: Probability of random erasing.
        clip: Largest gradient norm; 0 for none.
        ema: Decay of the averaged weights; 0 for none.
        sync_bn: Whether batch norms of several processes share their statistics (CUDA).
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
    """Read a recipe of the package.

    Args:
        name: traditional, adv-r50, adv-vit, adv-mixer or mbv1.
    """
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    values["milestones"] = tuple(values.get("milestones", ()))
    return Recipe(**values)


def resolve_recipe(config: TrainConfig) -> Recipe:
    """Return the recipe that a configuration names, with what the command line overrides."""
    released = load_recipe(config.recipe)

    # A setting of the same name wins over the recipe, unless it was left open.
    names = {field.name for field in fields(Recipe)}
    given = {name: getattr(config, name, None) for name in names}
    recipe = replace(released, **{name: v for name, v in given.items() if v is not None})

    # What is tied to the size of a batch and to the number of epochs moves with them.
    if config.scale_lr:
        recipe = replace(recipe, lr=recipe.lr * recipe.batch_size / released.batch_size)
    if recipe.schedule == "multistep" and config.epochs:
        moved = (round(m * recipe.epochs / released.epochs) for m in released.milestones)
        recipe = replace(recipe, milestones=tuple(sorted({max(1, epoch) for epoch in moved})))
    return replace(recipe, warmup_epochs=min(recipe.warmup_epochs, recipe.epochs // 5))


class TaskLoss(nn.Module):
    """Cross entropy with smoothing, or binary cross entropy summed over classes.

    Takes labels [b], or soft ones [b, k] as mixup gives them.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.kind, self.smoothing = recipe.loss, recipe.smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss as a mean over the batch."""
        if self.kind == "ce":
            return nn.functional.cross_entropy(
                logits.float(), target, label_smoothing=self.smoothing
            )

        # Summed over classes: a mean would make this term as many times weaker beside the features as
        # there are classes.
        if target.ndim == 1:
            target = nn.functional.one_hot(target, logits.shape[-1])
        by_class = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), target.to(torch.float32), reduction="none"
        )
        return by_class.sum(dim=-1).mean()
