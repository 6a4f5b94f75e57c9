"""What the trainer asks of a paradigm."""

import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from effml_common.errors import ConfigError
from effml_common.parsing import did_you_mean, one_line

BUILT_IN = {
    "clip": "com_pt.tasks.clip:ClipTask",
    "classify": "com_pt.tasks.classify:ClassifyTask",
    "causal-lm": "com_pt.tasks.causal_lm:CausalLMTask",
}


class Task(ABC):
    """A paradigm: how models are built, fed, judged and saved.

    A task of your own derives from this and is named ``module:Class`` in the chain file. It is also
    the data set: ``len`` and ``task[index]`` give samples, ``collate`` makes batches of them.

    Args:
        data: The ``data`` section of the chain file.

    Raises:
        ConfigError: If ``data`` has a setting that is not among ``settings``.
    """

    settings: ClassVar[frozenset[str]] = frozenset()  # of ``data``; empty: any
    streams: ClassVar[tuple[str, ...]] = ()  # outputs that are pulled to the predecessor's
    couples_samples: ClassVar[bool] = False  # whether the loss compares samples of a batch
    headline: ClassVar[str] = ""  # the metric of ``evaluate`` that tables show

    def __init__(self, data: Mapping[str, Any]) -> None:
        unknown = sorted(set(data) - self.settings) if self.settings else []
        if unknown:
            known = ", ".join(sorted(self.settings))
            raise ConfigError(f"there is no data setting {unknown[0]}; use {known}")
        self.data = data

    @abstractmethod
    def build(self, spec: Any) -> nn.Module:
        """A freshly initialised model from a stage's ``model`` setting."""

    def adopt(self, specs: Mapping[str, Any]) -> None:  # noqa: B027 (most need none)
        """Take the sizes of data that are not set from the stages' models, by stage; before reading.

        Optional: a task whose data have one size has nothing to take.

        Raises:
            ConfigError: If a model and the data settings differ.
        """

    def adopt_size(self, key: str, sizes: Mapping[str, Any]) -> None:
        """Set ``data[key]`` from the models' sizes, by stage, or check that it agrees with them."""
        wanted = self.data.get(key, [*sizes.values()][-1])
        for stage, size in sizes.items():
            if both(size) != both(wanted):
                raise ConfigError(
                    f"{key} of {stage} is {size} and the data are made for {wanted}; "
                    f"set data: {key} and the models alike"
                )
        self.data = {**self.data, key: wanted}

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """A sample; its randomness comes from torch's generator, which the loader seeds."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of samples, as tensors in tuples, lists or dicts."""
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    @abstractmethod
    def features(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Outputs of one forward pass: the streams, and whatever ``loss`` needs."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named loss terms; their sum is minimised."""

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 (most need none)
        """Called after every update, with the unwrapped model; optional."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out metrics; empty without held-out data."""
        return {}

    def chance(self) -> float | None:
        """Value of the headline metric for a model that knows nothing."""
        return None

    @abstractmethod
    def macs(self, spec: Any) -> int:
        """Forward MACs of one sample."""

    @abstractmethod
    def save(self, model: nn.Module, spec: Any, folder: Path) -> None:
        """Write a model into a folder, as its host library loads it."""

    @abstractmethod
    def load(self, folder: Path, spec: Any) -> nn.Module:
        """The model that ``save`` wrote."""


def both(size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def task_class(name: str) -> type[Task]:
    """The class of a task by its short name or ``module:Class``.

    Raises:
        ConfigError: If it cannot be found.
    """
    address = BUILT_IN.get(name, name)
    module, colon, attribute = address.partition(":")
    if not colon:
        hint = did_you_mean(name, list(BUILT_IN), f"use {', '.join(BUILT_IN)} or module:Class")
        raise ConfigError(f"there is no task {name}; {hint}")
    try:
        if name not in BUILT_IN and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task {name} cannot be imported: {one_line(str(error))}; check module:Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"{name} is no Task; derive it from com_pt.Task")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"task {name} lacks {missing}; define them in {attribute}")
    return found
