"""WebDataset shards that are visited one after the other instead of being indexed at the start.

The order of an epoch is a matter of numbers alone: shards are shuffled by (seed, epoch) and dealt to the
processes, and each process shuffles the numbers of its samples through a buffer. Who resumes skips
through these numbers and reads nothing. A reader process scans the headers of a shard when
its first sample is due.
"""

import json
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from com_pt.training.data.decoding import decode_json, decoding
from com_pt.training.data.loading import seed_of
from com_pt.training.data.shard_cache import load_or_scan
from com_pt.training.data.shards import ShardIndex
from effml_common.errors import InputError
from effml_common.logging import say, warn

T = TypeVar("T")
STRIDE = 2**32  # a sample is called by shard * STRIDE + its number there
SAMPLES_INDEXED = 200_000  # whose places each process keeps in memory


class ShardStream:
    """The samples of shards; each is called by the number ``shard * STRIDE + number``.

    Args:
        paths: The shards.
        samples: Of an epoch; None takes the numbers beside the shards, or counts headers.
        buffer: Samples among which each next one is drawn.

    Raises:
        InputError: If a number beside the shards is wrong, or a shard is damaged.
    """

    def __init__(self, paths: Sequence[Path], samples: int | None, buffer: int) -> None:
        self.paths, self.buffer = list(paths), buffer
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._counts: dict[int, int] = {}
        for shard, path in enumerate(self.paths):
            sizes = _sizes_beside(path)
            if path.name in sizes:
                self._counts[shard] = sizes[path.name]
        self.samples = samples if samples is not None else self._count_samples()

    def _count_samples(self) -> int:
        """Return the sum of the sizes beside the shards; else count headers, which is kept."""
        folders = {path.parent for path in self.paths}
        total = [_total_beside(folder) for folder in folders]
        is_whole = len(self.paths) == sum(len([*folder.glob("*.tar")]) for folder in folders)
        if len(self._counts) < len(self.paths):
            if is_whole and all(total):
                return sum(total)
            say(f"counting the samples of {len(self.paths)} shards; data: samples leaves this out")
        return sum(self.size(shard) for shard in range(len(self.paths)))

    def __len__(self) -> int:
        return self.samples

    def size(self, shard: int) -> int:
        """Return the number of samples of a shard."""
        if shard not in self._counts:
            self._counts[shard] = len(self.index(shard))
        return self._counts[shard]

    def index(self, shard: int) -> ShardIndex:
        """Return where the samples of a shard are; the last shards are kept in memory."""
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        index = self._indices[shard] = load_or_scan(self.paths[shard])
        if self._counts.get(shard, len(index)) < len(index):
            warn(
                f"{index.path} has {len(index)} samples, of which {self._counts[shard]} are read, as "
                "sizes.json says; correct it to read all"
            )
        while len(self._indices) > 1 and sum(map(len, self._indices.values())) > SAMPLES_INDEXED:
            self._indices.popitem(last=False)
        return self._indices[shard]

    def locate(self, key: int) -> tuple[ShardIndex, int]:
        """Return the index of a sample's shard, and its number there.

        Raises:
            InputError: If the shard is damaged, or has fewer samples than stands beside it.
        """
        shard, number = divmod(key, STRIDE)
        index = self.index(shard)
        if number >= len(index):
            raise InputError(
                f"{index.path} has {len(index)} samples, and sizes.json says {self.size(shard)}; "
                "correct it"
            )
        return index, number

    def first(self) -> int:
        """Return the first sample.

        Raises:
            InputError: If no shard has any.
        """
        for shard in range(len(self.paths)):
            if len(self.index(shard)):
                return shard * STRIDE
        raise InputError(f"{self.paths[0]} holds no samples; give shards with some")

    def after(self, key: int) -> int:
        """Return the sample that takes the place of one that cannot be read."""
        shard, number = divmod(key, STRIDE)
        if number + 1 < self.size(shard):
            return key + 1
        return (shard + 1) % len(self.paths) * STRIDE

    def order(self, seed: int, epoch: int, rank: int, world: int) -> Iterator[int]:
        """Yield the samples of a process in an epoch; beyond its last shard it begins again.

        Raises:
            InputError: If there are fewer shards than processes.
        """
        if len(self.paths) < world:
            raise InputError(
                f"{len(self.paths)} shards cannot be dealt to {world} processes; make more shards"
            )
        shards = [*range(len(self.paths))]
        random.Random(seed_of(seed, "shards", epoch)).shuffle(shards)
        own = shards[rank::world]
        for turn in count():
            generator = random.Random(seed_of(seed, "samples", epoch, rank, turn))
            samples = (
                shard * STRIDE + number for shard in own for number in range(self.size(shard))
            )
            yield from shuffle_through_buffer(samples, self.buffer, generator)
            if not any(self.size(shard) for shard in own):
                raise InputError(f"{self.paths[own[0]]} has no samples; leave it out")


def shuffle_through_buffer(items: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Yield items in another order: always a random one of ``size`` that wait."""
    waiting: list[T] = []
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
            continue
        place = generator.randrange(size)
        yield waiting[place]
        waiting[place] = item
    generator.shuffle(waiting)
    yield from waiting


def _sizes_beside(path: Path) -> dict[str, Any]:
    """Return ``sizes.json`` beside a shard, which maps its name to a number of samples; else nothing."""
    file = path.parent / "sizes.json"
    if not file.is_file():
        return {}
    with decoding(str(file), "correct it or take it away"):
        sizes = decode_json(file.read_bytes(), str(file))
    if not isinstance(sizes, dict) or not all(_is_count(size) for size in sizes.values()):
        raise InputError(f"{file}: no numbers of samples by shard; correct it or take it away")
    return sizes


def _total_beside(folder: Path) -> int:
    """Return the number in ``__len__`` of a folder, or 0 without that file."""
    file = folder / "__len__"
    if not file.is_file():
        return 0
    with decoding(str(file), "write the number of samples or take it away"):
        number = json.loads(file.read_text(encoding="utf-8"))
        if not _is_count(number):
            raise ValueError(f"{number!r} is no number of samples")
        return number


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
