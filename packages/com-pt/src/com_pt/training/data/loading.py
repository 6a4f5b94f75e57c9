"""The order of samples, and what happens to those that cannot be read.

Every sample's randomness comes from (seed, epoch, index), so that batches do not depend on the number
of processes or readers, nor on where a run was resumed.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from effml_common.errors import InputError
from effml_common.logging import warn
from effml_common.parsing import one_line

TOLERATED_UNREADABLE = 0.01  # share of a data set


def seed_of(*parts: Any) -> int:
    """Return a seed that is as good as independent for every tuple of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Batches:
    """Batches of a task from a given update on; every process gets its share of each.

    Args:
        task: Data set with ``collate``.
        batch: Samples per update over all processes.
        seed: The seed of order and augmentation.
        rank: This process.
        world: Number of processes.
        workers: Reader processes.

    Raises:
        InputError: If the data are fewer than a batch, or the batch cannot be split evenly.
    """

    def __init__(
        self, task: Any, batch: int, seed: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        self.samples, self.batch, self.seed = len(task), batch, seed
        self.rank, self.world, self.workers = rank, world, workers
        if self.samples == 0:
            raise InputError("there are no training data; give some under data: train")
        if self.samples < batch:
            raise InputError(
                f"{self.samples} training samples are fewer than one batch of {batch}; "
                "add data or lower batch_size"
            )
        if batch % world or batch < world:
            raise InputError(
                f"a batch of {batch} cannot be split over {world} processes; use a multiple of {world}"
            )
        self.readable = Readable(task, seed)
        self.collate = task.collate

    @property
    def per_epoch(self) -> int:
        """Updates in an epoch; the incomplete last batch is left out."""
        return self.samples // self.batch

    def keys(self, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """Yield (epoch, index) of this process's samples in the updates ``start`` to ``stop`` - 1."""
        shuffled_epoch, order = -1, []
        for step in range(start, stop):
            epoch, position = divmod(step, self.per_epoch)
            if shuffled_epoch != epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order = torch.randperm(self.samples, generator=generator).tolist()
                shuffled_epoch = epoch
            batch = order[position * self.batch : (position + 1) * self.batch]
            yield [(epoch, index) for index in batch[self.rank :: self.world]]

    def run(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the batches themselves, on the CPU.

        Raises:
            InputError: If more than 1 % of the samples cannot be read.
        """
        loader = DataLoader(
            self.readable,
            batch_sampler=self.keys(start, stop),  # lazily: a long run has many samples
            collate_fn=self._collate,
            num_workers=self.workers,
            persistent_workers=False,
        )
        for batch, bad in loader:
            self._count(bad)
            yield batch

    def _collate(self, read: list[tuple[Any, dict[int, str]]]) -> tuple[Any, dict[int, str]]:
        bad: dict[int, str] = {}
        for _, unreadable in read:
            bad |= unreadable
        return self.collate([sample for sample, _ in read]), bad

    def _count(self, bad: dict[int, str]) -> None:
        for index, reason in bad.items():
            if index not in self.readable.bad or get_worker_info() is not None:
                warn(f"sample {index} is skipped: {reason}")
            self.readable.bad[index] = reason
        if len(self.readable.bad) > TOLERATED_UNREADABLE * self.samples:
            names = "; ".join(list(self.readable.bad.values())[:3])
            raise InputError(
                f"{len(self.readable.bad)} of {self.samples} samples cannot be read, more than 1 % "
                f"({names}); repair the data"
            )


class Readable(Dataset[Any]):
    """The task's samples; in place of one that cannot be read comes the next that can."""

    def __init__(self, task: Any, seed: int) -> None:
        self.task, self.seed = task, seed
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[int, str]]:
        # The caller's random state is left as it was.
        epoch, index = key
        bad: dict[int, str] = {}
        random_state = torch.get_rng_state()
        try:
            # The sample itself, or the next one that can be read.
            for offset in range(len(self.task)):
                candidate = (index + offset) % len(self.task)
                # Not torch.manual_seed, which also visits CUDA and takes longer than a small sample.
                torch.default_generator.manual_seed(seed_of(self.seed, "sample", epoch, candidate))
                try:
                    return self.task[candidate], bad
                except (OSError, ValueError, SyntaxError) as error:
                    bad[candidate] = one_line(str(error))
                if len(bad) > TOLERATED_UNREADABLE * len(self.task) + 1:
                    break
        finally:
            torch.set_rng_state(random_state)

        # Too many in a row are no accident.
        raise InputError(
            f"{len(bad)} samples in a row cannot be read ({next(iter(bad.values()))}); repair the data"
        )
