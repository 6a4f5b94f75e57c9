"""Sentences of machine-written captions: how they are split and drawn."""

from collections import Counter
from typing import Any

import pytest
import torch
from com_pt_tiny import clip_data
from torch import Tensor

from com_pt.training.data.loading import Batches, Readable
from com_pt.training.data.sentences import CaptionRule, split_sentences
from com_pt.training.tasks.clip import ClipTask
from effml_common.errors import InputError

CHI_SQUARE_11 = 31.26  # 99.9 % quantile at 11 degrees of freedom
EPOCHS = 1500
LETTERS = "abcdefghijkl"  # twelve sentences of one word each


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog runs. It is wet.", ["A dog runs", "It is wet"]),
        ("no end", ["no end"]),
        ("Joined.Without a space", ["Joined", "Without a space"]),
        ("It is 3.5 m. High", ["It is 3.5 m", "High"]),
        ("Two lines\nof one</s>caption.</s>", ["Two lines", "of one", "caption"]),
        ("Wait... What? Yes!", ["Wait", "What? Yes!"]),
        (" . \n", []),
        ("?! ... ,", ["?!", ","]),
        ("About 3.5 m, e.g. here", ["About 3.5 m, e", "g", "here"]),  # as DreamLIP splits English
        ("一只狗在跑。它很湿！真的？是的", ["一只狗在跑", "它很湿", "真的", "是的"]),
        ("高さ3。5は別。", ["高さ3", "5は別"]),
        ("。！", []),
    ],
)
def test_captions_are_split_at_periods_and_line_ends(text, sentences) -> None:
    assert split_sentences(text) == sentences


def task_of_letters(folder: Any, *columns: str, captions: int = 7) -> ClipTask:
    """A task of 48 pictures whose captions are ``columns``, behind the raw caption ``raw``."""
    header = "\t".join(["path", "raw", *(f"c{i}" for i in range(len(columns)))])
    rows = "".join("\t".join([f"{i}.png", "raw", *columns]) + "\n" for i in range(48))
    (folder / "captions.tsv").write_text(f"{header}\n{rows}")
    words = ["raw", *LETTERS]
    return ClipTask(clip_data(folder, tokenizer=words, captions=captions, sentences=True))


def words_of(tokens: Tensor) -> list[str]:
    """The first word of each text of a sample."""
    return [["", "raw", *LETTERS][int(i)] for i in tokens[:, 0]]


def spread(counts: Counter[str], drawn: int) -> float:
    """Statistic of equal counts, chi-square with n - 1 degrees of freedom if draws are fair.

    Drawing without replacement spreads counts less than the multinomial distribution does.
    """
    n, share = len(LETTERS), drawn / len(LETTERS)
    expected = EPOCHS * share
    squares = sum((counts[letter] - expected) ** 2 for letter in LETTERS)
    return squares / (EPOCHS * share * (1 - share)) * (n - 1) / n


def test_all_sentences_of_a_sample_are_drawn_equally_often(pictures) -> None:
    task = task_of_letters(pictures, "a. b", "c", "d. e. f. g.", "h. i", "j", "k. l")
    readable = Readable(task, seed=5)
    draws = [words_of(readable[epoch, 3][0][1]) for epoch in range(EPOCHS)]
    assert all(draw[0] == "raw" and len({*draw}) == 7 for draw in draws)
    counts = Counter(word for draw in draws for word in draw[1:])
    assert spread(counts, 6) < CHI_SQUARE_11
    assert len({tuple(draw) for draw in draws}) > 0.99 * EPOCHS

    # The released draw would be found out: it never takes the last sentence.
    generator = torch.Generator().manual_seed(0)
    released = Counter[str]()
    for _ in range(EPOCHS):
        released.update(LETTERS[i] for i in torch.randperm(11, generator=generator)[:6].tolist())
    assert spread(released, 6) > 10 * CHI_SQUARE_11


def test_too_few_sentences_are_drawn_with_replacement(pictures) -> None:
    readable = Readable(task_of_letters(pictures, "a. b", "c"), seed=5)
    draws = [words_of(readable[epoch, 0][0][1])[1:] for epoch in range(EPOCHS)]
    assert {len(draw) for draw in draws} == {6}
    counts = Counter(word for draw in draws for word in draw)
    expected = 6 * EPOCHS / 3
    statistic = sum((counts[letter] - expected) ** 2 / expected for letter in "abc")
    assert statistic < 13.82  # 99.9 % at 2 degrees of freedom
    assert {*counts} == {*"abc"}


def test_draws_agree_between_processes_and_readers_and_differ_between_epochs(pictures) -> None:
    task = task_of_letters(pictures, "a. b. c. d. e. f", "g. h. i. j. k. l")

    def tokens(**how: int) -> list[Tensor]:
        return [batch[1] for batch in Batches(task, 8, seed=3, **how).run(0, 12)]

    alone, read = tokens(workers=0), tokens(workers=2)
    assert all(torch.equal(a, b) for a, b in zip(alone, read, strict=True))
    halves = [tokens(rank=rank, world=2, workers=rank) for rank in range(2)]
    for step, whole in enumerate(alone):
        for rank in range(2):
            assert torch.equal(halves[rank][step], whole[rank::2])
    first, second = torch.cat(alone[:6]), torch.cat(alone[6:])
    assert (first[:, 1:, 0].sort(1).values != second[:, 1:, 0].sort(1).values).any(1).sum() > 40


def test_whole_captions_are_drawn_without_replacement() -> None:
    rule = CaptionRule(drawn=3)
    draws = [rule.draw(LETTERS) for _ in range(EPOCHS)]
    assert all(len({*draw}) == 3 for draw in draws)
    assert spread(Counter(word for draw in draws for word in draw), 3) < CHI_SQUARE_11
    assert CaptionRule().draw(["x", "y"]) == CaptionRule(drawn=2).draw(["x", "y"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("raw\t", "row 2: no caption beside the raw one to draw sentences from; add some or set s"),
        ("raw\t. .", "row 2: no caption beside the raw one"),
        (" \ta. b", "row 2: the first caption, the raw one, is empty; add it"),
    ],
)
def test_images_without_sentences_are_refused(pictures, row, message) -> None:
    (pictures / "captions.tsv").write_text(f"path\traw\tmore\n0.png\t{row}\n")
    with pytest.raises(InputError, match=message):
        len(ClipTask(clip_data(pictures, sentences=True, captions=7)))


def test_sentences_need_a_number_of_texts() -> None:
    with pytest.raises(
        InputError, match="captions is 1, and sentences come beside the raw caption"
    ):
        ClipTask({"sentences": True})
