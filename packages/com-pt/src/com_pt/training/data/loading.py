"""The order of samples, who reads them, and what happens to those that cannot be read.

Every sample's randomness comes from (seed, epoch, sample), so that batches do not depend on the number
of readers, nor on where a run was resumed; nor on the number of processes, unless shards are dealt to
them (``stream``).
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from effml_common.errors import InputError
from effml_common.logging import warn
from effml_common.parsing import one_line

TOLERATED_UNREADABLE = 0.01  # share of a data set
MOST_READERS = 8  # reader processes of a training process, unless the settings say otherwise
BATCHES_AHEAD = 2  # that each reader process prepares


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
        workers: Reader processes; None chooses by the CPUs.

    Raises:
        InputError: If the data are fewer than a batch, or the batch cannot be split evenly.
    """

    def __init__(
        self,
        task: Any,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int | None = 0,
    ) -> None:
        self.samples, self.batch, self.seed = len(task), batch, seed
        self.rank, self.world = rank, world
        self.workers = reader_count(task) if workers is None else workers
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
        """Yield (epoch, sample) of this process's samples in the updates ``start`` to ``stop`` - 1."""
        share = self.batch // self.world
        for epoch in range(start // self.per_epoch, -(-stop // self.per_epoch)):
            first = max(start - epoch * self.per_epoch, 0)
            last = min(stop - epoch * self.per_epoch, self.per_epoch)
            order = islice(self._order(epoch), first * share, None)
            for _ in range(first, last):
                yield [(epoch, sample) for sample in islice(order, share)]

    def _order(self, epoch: int) -> Iterator[int]:
        """Yield the samples of this process in an epoch: a shuffle of all, or of its shards."""
        if self.readable.stream is not None:
            return self.readable.stream.order(self.seed, epoch, self.rank, self.world)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        order = torch.randperm(self.samples, generator=generator)
        # Batches are dealt sample by sample, and the last one is whole for all processes.
        return iter(order[: self.per_epoch * self.batch][self.rank :: self.world].tolist())

    def run(self, start: int, stop: int) -> Iterator[Any]:
        """Yield the batches themselves, on the CPU; in pinned memory where CUDA is in use.

        The reader processes live until the last batch.

        Raises:
            InputError: If more than 1 % of the samples cannot be read.
        """
        loader = DataLoader(
            Reported(self.readable),
            batch_sampler=self.keys(start, stop),  # lazily: a long run has many samples
            collate_fn=self._collate,
            num_workers=self.workers,
            prefetch_factor=BATCHES_AHEAD if self.workers else None,
            pin_memory=torch.cuda.is_initialized(),
            worker_init_fn=prepare_reader,
        )
        for read in loader:
            if isinstance(read, InputError):
                raise read
            batch, bad = read
            self._count(bad)
            yield batch

    def _collate(self, read: list[Any]) -> tuple[Any, dict[int, str]] | InputError:
        failed = next((sample for sample in read if isinstance(sample, InputError)), None)
        if failed is not None:
            return failed
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


def reader_count(task: Any) -> int:
    """Return how many processes read for this one: its share of the CPUs but one, at most eight.

    None where the task's samples are in memory.
    """
    if not getattr(task, "has_readers", False):
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(MOST_READERS, cpus // processes - 1))


def prepare_reader(_: int) -> None:
    """Give a reader process one thread, and leave signals to the process that trains.

    A signal that a scheduler sends to all processes would else end the readers, and with them the run,
    before its checkpoint.
    """
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


class Readable(Dataset[Any]):
    """The task's samples; in place of one that cannot be read comes the next that can.

    Args:
        task: Data set.
        seed: The seed of augmentation.
    """

    def __init__(self, task: Any, seed: int) -> None:
        self.task, self.seed = task, seed
        self.stream = getattr(task, "stream", None)
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[int, str]]:
        # The caller's random state is left as it was.
        epoch, candidate = key
        bad: dict[int, str] = {}
        random_state = torch.get_rng_state()
        try:
            # The sample itself, or the next one that can be read.
            while candidate not in bad and len(bad) <= TOLERATED_UNREADABLE * len(self.task) + 1:
                # Not torch.manual_seed, which also visits CUDA and takes longer than a small sample.
                torch.default_generator.manual_seed(seed_of(self.seed, "sample", epoch, candidate))
                try:
                    return self.task[candidate], bad
                except (OSError, ValueError, SyntaxError) as error:
                    bad[candidate] = one_line(str(error))
                candidate = self._after(candidate)
        finally:
            torch.set_rng_state(random_state)

        # Too many in a row are no accident.
        raise InputError(
            f"{len(bad)} samples in a row cannot be read ({next(iter(bad.values()))}); repair the data"
        )

    def _after(self, sample: int) -> int:
        if self.stream is not None:
            return self.stream.after(sample)
        return (sample + 1) % len(self.task)


class Reported(Dataset[Any]):
    """Samples, or the error instead: one that a reader process raises arrives as its whole traceback."""

    def __init__(self, readable: Readable) -> None:
        self.readable = readable

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, dict[int, str]] | InputError:
        try:
            return self.readable[key]
        except InputError as error:
            return InputError(str(error))  # without its cause, which may not travel
