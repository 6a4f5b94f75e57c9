"""Held-out data through a model, batch by batch: only the rows that a metric needs are kept.

Among several processes each computes whole batches, the same that a single process would make, and all
receive the rows of all, in the order of the data. So the metrics of several processes are those of one,
to the bit. Every process must call these functions together.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, default_collate

from com_pt.training.data.counts import read_count
from com_pt.training.data.loading import prepare_reader, reader_count
from effml_common.errors import InputError
from effml_common.logging import Progress, say

SMALL_SET = 2048  # items that are read before a worker has started
SHOWN_BATCHES = 20  # a longer loop shows its progress
ESTIMATE_AFTER = 5.0  # seconds until the speed is known well enough


@dataclass(frozen=True)
class Reading:
    """How a held-out set is read.

    Args:
        device: Where the model is: batches for a CUDA device are copied from pinned memory.
        batch: Items of a forward pass.
        workers: Reader processes; None chooses by the size of the set and the number of CPUs.
    """

    device: torch.device
    batch: int = 256
    workers: int | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any], model: Any) -> "Reading":
        """Return what the data settings ``val_batch`` and ``val_workers`` ask for."""
        workers = data.get("val_workers")
        device = next(model.parameters()).device
        workers = None if workers is None else int(workers)
        return cls(device, read_count(data, "val_batch", 256), workers)

    def workers_for(self, items: Any) -> int:
        """Return the number of reader processes for a set: as in training, but none for a small one."""
        if self.workers is not None:
            return self.workers
        return 0 if len(items) < SMALL_SET else reader_count(items)


class HeldOutPictures(Dataset[Tensor]):
    """The pictures of a data set that has ``image(index)``, alone or with their labels."""

    has_readers = True  # decoding takes longer than handing over to another process

    def __init__(self, data: Any, labels: Tensor | None = None) -> None:
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        """Return a picture, or the error of one that cannot be read.

        An error that a reader process raises loses its message, so it is handed over as a value.
        """
        try:
            picture = self.data.image(index)
        except InputError as error:
            return error
        return picture if self.labels is None else (picture, self.labels[index])


def stream_rows(
    compute: Callable[[Any], Tensor],
    items: Any,
    reading: Reading,
    what: str,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> Tensor:
    """Return the rows that a function computes from batches of a set, in the set's order.

    Args:
        compute: A batch to a tensor [n, ...] on the model's device.
        items: Has a length and, by index, items.
        reading: How it is read.
        what: What is done, for the progress: "encoding images".
        collate: Makes a batch of items.

    Raises:
        InputError: If there are no items, or one cannot be read.
    """
    # Batches of this process: every so manieth, so that all finish together.
    if len(items) == 0:
        raise InputError("there are no held-out samples; give some")
    indices = torch.arange(len(items)).split(reading.batch)
    number, processes = process_share()
    own = [part.tolist() for part in indices[number::processes]]

    # Readers work ahead of the model; nothing but the rows stays.
    loader = DataLoader(
        items,
        batch_sampler=own,
        collate_fn=_Collate(collate),
        num_workers=reading.workers_for(items),
        worker_init_fn=prepare_reader,
        pin_memory=reading.device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the generator of a training run
    )
    rows = []
    for batch in _with_progress(loader, len(own), what):
        if isinstance(batch, InputError):
            raise batch
        rows.append(compute(batch))
    return gather_batches(rows, reading.device)


class _Collate:
    """Makes a batch, or passes the first error on; a class, because workers may be spawned."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        errors = [item for item in items if isinstance(item, InputError)]
        return errors[0] if errors else self.collate(items)


def _with_progress(batches: Any, count: int, what: str) -> Iterator[Any]:
    """Yield batches; show the progress of a long set, and say so if it takes more than a minute."""
    if count < SHOWN_BATCHES:
        yield from batches
        return
    began, is_announced = time.monotonic(), False
    with Progress(what, count) as bar:
        for number, batch in enumerate(batches, 1):
            yield batch
            bar.advance()

            # Once, when the speed is known.
            elapsed = time.monotonic() - began
            if not is_announced and elapsed > ESTIMATE_AFTER:
                is_announced = True
                remaining = elapsed / number * (count - number)
                if remaining > 60:
                    say(f"{what}: about {remaining / 60:.1f} minutes for {count} batches")


def process_share() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather_batches(own: list[Tensor], device: torch.device) -> Tensor:
    """Return the rows of all batches, where process r of w computed the batches r, r + w, r + 2w, ...

    Shares differ in size, and a process may have none; they travel padded to the largest.
    """
    _, processes = process_share()
    if processes == 1:
        return torch.cat(own)

    # Everyone learns the sizes; the first process always has a batch.
    sizes: list[Any] = [None] * processes
    distributed.all_gather_object(sizes, [(rows.shape, rows.dtype) for rows in own])
    shape, kind = sizes[0][0]
    lengths = [[shape[0] for shape, _ in share] for share in sizes]

    # The rows themselves.
    longest = max(sum(share) for share in lengths)
    padded = torch.zeros(longest, *shape[1:], dtype=kind, device=device)
    if own:
        rows = torch.cat(own)
        padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(processes)]
    distributed.all_gather(shares, padded)

    # Back into the order of the data.
    batches = [
        share[: sum(length)].split(length) for share, length in zip(shares, lengths, strict=True)
    ]
    count = sum(map(len, batches))
    return torch.cat([batches[i % processes][i // processes] for i in range(count)])
