"""Buffers of texts and places: what they hold, what they weigh, and who shares them."""

import sys
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader, Dataset

from com_pt.training.data.packed import FileBuffer, PackedTexts

SAMPLES, CAPTIONS = 100_000, 7
MOST_BYTES = 300  # of a sample, beside its texts


class Lengths(Dataset[int]):
    def __init__(self, texts: PackedTexts) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> int:
        return sum(map(len, self.texts[index]))


def captions_of(i: int) -> list[str]:
    return [f"caption {k} of sample {i}, größer 猫" for k in range(CAPTIONS)]


def test_lists_come_back_as_they_were_put_in() -> None:
    lists = [["a", "", "größer"], [], ["猫"], ["x" * 1000]]
    texts = PackedTexts.of(lists)
    assert [*texts] == lists
    assert texts[-1] == lists[-1]
    assert texts[1:3] == lists[1:3]
    assert len(texts) == 4


def test_a_sample_weighs_under_300_bytes_beside_its_texts() -> None:
    files, texts, letters = FileBuffer(), [], 0
    for i in range(SAMPLES):
        path = f"/data/images/{i:09}.jpg"
        files.append(path)
        letters += len(path.encode()) + sum(len(text.encode()) for text in captions_of(i))
    texts = PackedTexts.of(captions_of(i) for i in range(SAMPLES))
    pictures = files.pack()
    assert pictures.name(77) == "/data/images/000000077.jpg"
    assert (texts.nbytes + pictures.nbytes - letters) / SAMPLES < MOST_BYTES

    # Nothing else belongs to a sample: there are no objects beside the buffers.
    held = [*vars(texts).values(), *vars(pictures).values()]
    assert {type(value) for value in held} == {torch.Tensor, PackedTexts}
    assert sum(map(sys.getsizeof, held)) < 10_000

    # Lists of texts would not keep the bound.
    plain = sum(sys.getsizeof(line) + sum(map(sys.getsizeof, line)) for line in texts[:1000])
    content = sum(len(text.encode()) for line in texts[:1000] for text in line)
    assert (plain - content) / 1000 > MOST_BYTES


def test_pictures_of_one_tar_share_its_path() -> None:
    files = FileBuffer()
    for i in range(1000):
        files.append("shards/00000.tar" if i < 500 else "shards/00001.tar", 512 * i, 100)
    pictures = files.pack()
    assert [pictures.name(i) for i in (0, 499, 500)] == [f"shards/0000{k}.tar" for k in (0, 0, 1)]
    assert pictures.nbytes < 21 * 1000


def test_reader_processes_share_the_buffers() -> None:
    lists = [captions_of(i) for i in range(640)]
    texts = PackedTexts.of(lists)
    loader = DataLoader(Lengths(texts), 8, num_workers=1)  # forked: it sees the parent's own pages
    assert torch.cat([*loader]).tolist() == [sum(map(len, line)) for line in lists]

    # A spawned process is sent a handle of the memory and not its content.
    sent = bytes(ForkingPickler.dumps(texts))
    assert len(sent) < 2000 < texts.nbytes / 100
    received = ForkingPickler.loads(sent)
    assert [*received] == lists
    received.content[0] = ord("C")
    assert texts[0][0] == "C" + lists[0][0][1:]
