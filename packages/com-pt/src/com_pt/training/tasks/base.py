"""What the trainer asks of a training paradigm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from effml_common.errors import ConfigError


class Task(ABC):
    """A paradigm: how models are built, fed, judged and saved.

    A task of your own derives from this and is named ``module:Class`` in the chain file. It is also
    the data set: ``len`` and ``task[index]`` give samples, ``collate`` makes batches of them.

    Args:
        data: The ``data`` section of the chain file.

    Raises:
        ConfigError: If ``data`` has a setting that is not among ``settings``.

    Example:
        >>> import torch
        >>> class Autoencode(Task):
        ...     streams = ("code",)  # what is pulled to the predecessor's
        ...     def build(self, spec):
        ...         return nn.Sequential(nn.Linear(8, spec), nn.Linear(spec, 8))
        ...     def __len__(self):
        ...         return 256
        ...     def __getitem__(self, index):
        ...         return torch.sin(torch.arange(8) * (1 + index / 64))
        ...     def features(self, model, batch):
        ...         code = model[0](batch)
        ...         return {"code": code, "error": model[1](code) - batch}
        ...     def loss(self, outputs):
        ...         return {"squared error": outputs["error"].square().mean()}
        ...     def macs(self, spec):
        ...         return 16 * spec
        ...     def save(self, model, spec, folder): ...
        ...     def load(self, folder, spec): ...
        >>> task = Autoencode({})
        >>> outputs = task.features(task.build(4), task.collate([task[0], task[1]]))
        >>> outputs["code"].shape
        torch.Size([2, 4])
    """

    settings: ClassVar[frozenset[str]] = frozenset()  # of ``data``; empty: any
    streams: ClassVar[tuple[str, ...]] = ()  # outputs that are pulled to the predecessor's
    couples_samples: ClassVar[bool] = False  # whether the loss compares samples of a batch
    headline: ClassVar[str] = ""  # the metric of ``evaluate`` that tables show
    has_readers: ClassVar[bool] = False  # whether samples take long enough for reader processes
    stream: Any = None  # a ``ShardStream``, whose numbers are then those of the samples

    def __init__(self, data: Mapping[str, Any]) -> None:
        unknown = sorted(set(data) - self.settings) if self.settings else []
        if unknown:
            known = ", ".join(sorted(self.settings))
            raise ConfigError(f"there is no data setting {unknown[0]}; use {known}")
        self.data = data

    @abstractmethod
    def build(self, spec: Any) -> nn.Module:
        """Build a freshly initialised model from a stage's ``model`` setting."""

    def adopt(self, specs: Mapping[str, Any]) -> None:  # noqa: B027 (most need none)
        """Take the sizes of data that are not set from the stages' models, by stage; before reading.

        Optional: a task whose data have one size has nothing to take.

        Raises:
            ConfigError: If a model and the data settings differ.
        """

    def check_data(self) -> None:  # noqa: B027 (most need none)
        """Look at the held-out data before training starts; called after ``adopt``.

        Optional: otherwise a fault in them is met when the first member has been trained.

        Raises:
            InputError: If they cannot be read.
        """

    def adopt_size(self, key: str, sizes: Mapping[str, Any]) -> None:
        """Set ``data[key]`` from the models' sizes, by stage, or check that it agrees with them."""
        data_size = self.data.get(key, [*sizes.values()][-1])
        for stage, size in sizes.items():
            if height_and_width(size) != height_and_width(data_size):
                raise ConfigError(
                    f"{key} of {stage} is {size} and the data are made for {data_size}; "
                    f"set data: {key} and the models alike"
                )
        self.data = {**self.data, key: data_size}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return a sample; its randomness comes from torch's generator, which the loader seeds."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Make a batch of samples, as tensors in tuples, lists or dicts."""
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    @abstractmethod
    def features(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the outputs of one forward pass: the streams, and whatever ``loss`` needs."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named loss terms; their sum is minimised."""

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 (most need none)
        """Change the unwrapped model after every update; optional."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return held-out metrics; empty without held-out data."""
        return {}

    def chance(self) -> float | None:
        """Return the value of the headline metric for a model that knows nothing."""
        return None

    @abstractmethod
    def macs(self, spec: Any) -> int:
        """Return the forward MACs of one sample."""

    @abstractmethod
    def save(self, model: nn.Module, spec: Any, folder: Path) -> None:
        """Write a model into a folder, as its host library loads it."""

    @abstractmethod
    def load(self, folder: Path, spec: Any) -> nn.Module:
        """Load the model that ``save`` wrote."""


def height_and_width(size: int | Sequence[int]) -> tuple[int, ...]:
    """Return height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)
