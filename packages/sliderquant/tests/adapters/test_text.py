"""The tokens in front of samples and chunks, against what the tokenizer itself does."""

import dataclasses
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from effml_common.errors import InputError
from sliderquant.adapters.files import load_model
from sliderquant.adapters.text import (
    begin_note,
    begin_tokens,
    calibration_samples,
    check_tokens,
    chunks,
    encode,
    read_tokens,
)
from sliderquant.commands import quantize as quantize_command
from sliderquant.commands import sensitivity as sensitivity_command
from sliderquant.commands.eval import evaluate, text_perplexity
from sliderquant.config import EvalConfig, QuantizeConfig, SensitivityConfig
from sliderquant.method.sampling import held_out_samples

BOS = 0  # of the demo's tokenizer, which has it and does not use it


@pytest.fixture
def model_with_bos(model_copy, with_begin):
    """The folder of the small model, whose tokenizer puts BOS in front of every text."""
    tokenizer = with_begin(load_model(model_copy).tokenizer)
    tokenizer.save_pretrained(model_copy)
    assert load_model(model_copy).tokenizer("def")["input_ids"][0] == BOS
    return model_copy


@pytest.mark.parametrize(
    ("front", "behind", "expected"),
    [
        ("<|end|>", "", [0]),
        ("<|end|>", "<|end|>", [0]),
        ("", "<|end|>", []),
        ("<|end|> <|end|>", "<|end|>", [0, 0]),
    ],
)
def test_begin_is_what_stands_in_front_and_nothing_behind(
    loaded, with_begin, front, behind, expected
) -> None:
    assert begin_tokens(loaded.tokenizer) == []
    with_begin(loaded.tokenizer, front, behind)
    assert begin_tokens(loaded.tokenizer) == expected


@pytest.mark.parametrize("adds", [True, False])
def test_llamas_own_tokenizer_decides(adds) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=[("▁", "a")], add_bos_token=adds, add_eos_token=True
    )
    assert begin_tokens(tokenizer) == ([1] if adds else [])
    assert encode(["aa"], tokenizer).tolist() == [5, 4]
    note = begin_note(begin_tokens(tokenizer), tokenizer)
    assert ("starts with <s>, as the tokenizer puts it" in note) == adds
    assert ("puts nothing in front" in note) != adds


def test_special_tokens_that_change_the_text_are_refused(loaded) -> None:
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 9, 2] if add_special_tokens else [8]}

    with pytest.raises(InputError, match=r"as \[8\] without and \[1, 9, 2\] with special tokens"):
        begin_tokens(tokenizer)


def test_the_stream_has_no_special_tokens_but_those_in_the_text(loaded, with_begin) -> None:
    bare = encode(["def f", "x = 1"], loaded.tokenizer)
    with_begin(loaded.tokenizer, "<|end|>", "<|end|>")
    assert torch.equal(encode(["def f", "x = 1"], loaded.tokenizer), bare)
    assert BOS not in bare
    assert encode(["<|end|>def f"], loaded.tokenizer).tolist().count(BOS) == 1


def test_without_begin_samples_and_chunks_are_plain_cuts() -> None:
    """The same draws and the same cuts as indexing the stream directly."""
    stream = torch.randint(100, (9000,), generator=torch.Generator().manual_seed(1))
    starts = torch.randint(9000 - 64 + 1, (9, 1), generator=torch.Generator().manual_seed(5))
    expected = stream[starts + torch.arange(64)]
    assert torch.equal(calibration_samples(stream, 9, 64, 5), expected)
    assert torch.equal(calibration_samples(stream, 9, 64, 5, []), expected)

    batches = list(chunks(stream, 64, 4, []))
    assert [len(batch) for batch in batches] == [4] * 35
    assert torch.equal(torch.cat(batches), stream[: 140 * 64].view(140, 64))


@pytest.mark.parametrize(
    ("tokens", "nsamples"),
    [(64, 9), (65, 2), (97, 9), (1000, 9), (2000, 40), (9999, 40), (12_000, 40)],
)
def test_held_out_samples_of_a_short_text_share_no_token_with_others(tokens, nsamples) -> None:
    samples = calibration_samples(torch.arange(tokens), nsamples, 32, 0, [7])
    apart = held_out_samples(nsamples)
    fitted, held_out = samples[:-apart, 1:], samples[-apart:, 1:]
    assert len(samples) == nsamples
    assert set(fitted.flatten().tolist()).isdisjoint(held_out.flatten().tolist())


def test_held_out_samples_come_from_all_over_the_text() -> None:
    samples = calibration_samples(torch.arange(32 * 32 * 40), 160 * 8, 32, 0)
    first = samples[-held_out_samples(len(samples)) :, 0]
    assert len((first // (32 * 32)).unique()) > 30  # of 40 stretches
    assert len(first.unique()) > 100


def test_a_text_too_short_to_hold_samples_apart_is_named(capsys) -> None:
    assert calibration_samples(torch.arange(63), 9, 32, 0).shape == (9, 32)
    assert "63 tokens, too few to hold samples of 32 apart" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [[700], [700, 701]])
def test_every_sample_begins_and_then_continues_the_stream(begin) -> None:
    stream = torch.arange(500)
    samples = calibration_samples(stream, 40, 32, 0, begin)
    assert samples.shape == (40, 32)
    assert samples[:, : len(begin)].tolist() == [begin] * 40
    text = samples[:, len(begin) :]
    assert torch.equal(text, text[:, :1] + torch.arange(32 - len(begin)))
    assert int(samples[:, len(begin) :].max()) < 500
    assert len(text[:, 0].unique()) > 20


def test_every_chunk_begins_and_no_token_is_lost_or_repeated() -> None:
    got = torch.cat(list(chunks(torch.arange(205), 50, 3, [700])))
    assert got[:, 0].tolist() == [700] * 4
    assert torch.equal(got[:, 1:], torch.arange(4 * 49).view(4, 49))


def test_a_piece_that_begins_by_itself_does_not_begin_twice() -> None:
    # Chats of four tokens: a template has written BOS (7) in front of each.
    stream = torch.tensor([7, 1, 2, 3] * 40)
    samples = calibration_samples(stream, 60, 8, 0, [7])
    assert samples.shape == (60, 8)
    assert samples[:, 0].tolist() == [7] * 60
    assert 7 not in samples[:, 1]
    # Some of them were drawn exactly at a chat's beginning, and are that chat.
    assert [7, 1, 2, 3, 7, 1, 2, 3] in samples.tolist()

    # Chunks: the first is at a beginning; seven tokens on, the second is not.
    first, second, *_ = torch.cat(list(chunks(stream, 8, 1, [7]))).tolist()
    assert first == [7, 1, 2, 3, 7, 1, 2, 3]
    assert second == first  # begins at the third chat's own BOS, which is not repeated
    third = torch.cat(list(chunks(stream[1:], 9, 1, [7])))[1].tolist()
    assert third == [7, 1, 2, 3, 7, 1, 2, 3, 7]


def test_samples_without_room_for_text_are_refused() -> None:
    with pytest.raises(InputError, match="seqlen is 2, and the tokenizer puts 2 tokens in front"):
        calibration_samples(torch.arange(90), 1, 2, 0, [7, 8])
    with pytest.raises(InputError, match="give 2 or more"):
        chunks(torch.arange(90), 1, 1, [7])


def test_a_chat_template_that_writes_bos_does_not_double_it(loaded, with_begin, tmp_path) -> None:
    with_begin(loaded.tokenizer)
    loaded.tokenizer.chat_template = (
        "<|end|>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    line = json.dumps({"messages": [{"role": "user", "content": "import os"}]})
    (tmp_path / "chats.jsonl").write_text(f"{line}\n" * 9)
    stream = read_tokens([str(tmp_path / "chats.jsonl")], loaded.tokenizer, loaded.model)
    assert stream[0] == BOS
    assert stream.tolist().count(BOS) == 9
    for batch in chunks(stream, 16, 4, begin_tokens(loaded.tokenizer)):
        assert batch[:, 0].tolist() == [BOS] * len(batch)
        assert not bool(((batch[:, 1:] == BOS) & (batch[:, :-1] == BOS)).any())


def with_token_384(loaded) -> None:
    """Let the tokenizer know a word of its own, for which the model's 384 rows have none."""
    loaded.tokenizer.add_tokens(["<|beyond|>"])
    assert loaded.tokenizer.convert_tokens_to_ids("<|beyond|>") == 384
    assert loaded.model.get_input_embeddings().weight.shape[0] == 384


@pytest.mark.parametrize("in_text", [True, False], ids=["text", "begin"])
def test_a_token_beyond_the_embedding_is_refused(loaded, with_begin, tmp_path, in_text) -> None:
    (tmp_path / "a.txt").write_text("import os <|beyond|> import sys" if in_text else "import os")
    path = str(tmp_path / "a.txt")
    read_tokens([path], loaded.tokenizer, loaded.model)  # the word is pieces of text yet
    with_token_384(loaded)
    if not in_text:
        with_begin(loaded.tokenizer, "<|beyond|>")
    with pytest.raises(InputError, match="makes token 384, the model knows 384; use the tokenizer"):
        read_tokens([path], loaded.tokenizer, loaded.model)
    check_tokens([0, 383], loaded.model)
    check_tokens([], loaded.model)


@pytest.mark.parametrize("command", ["calib", "eval_text", "eval", "sensitivity", "perplexity"])
def test_every_text_is_checked_against_the_model(
    command, model_copy, text_file, held_out_file, tmp_path
) -> None:
    loaded = load_model(model_copy)
    with_token_384(loaded)
    loaded.tokenizer.save_pretrained(model_copy)
    odd = tmp_path / "odd.txt"
    odd.write_text(held_out_file.read_text() + "<|beyond|>")
    common = {"model": str(model_copy), "out": str(tmp_path / "out"), "device": "cpu"}
    small = {**common, "group_size": 32, "nsamples": 2, "seqlen": 32}
    good, bad = (str(text_file),), (str(odd),)
    runs = {
        "calib": lambda: quantize_command.quantize(QuantizeConfig(calib=bad, **small)),
        "eval_text": lambda: quantize_command.quantize(
            QuantizeConfig(calib=good, eval_text=bad, **small)
        ),
        "eval": lambda: evaluate(EvalConfig(text=bad, **common)),
        "sensitivity": lambda: sensitivity_command.sensitivity(
            SensitivityConfig(text=bad, **small)
        ),
        "perplexity": lambda: text_perplexity(loaded, str(odd)),
    }

    with pytest.raises(InputError, match="the tokenizer makes token 384, the model knows 384; use"):
        runs[command]()


def test_text_that_the_tokenizer_cannot_encode_is_one_line(loaded) -> None:
    vocabulary = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<none>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
    assert encode(["a"], tokenizer).tolist() == [1]
    with pytest.raises(InputError, match="the tokenizer cannot encode the text") as caught:
        encode(["b"], tokenizer)
    assert "\n" not in str(caught.value)


def by_hand(loaded, text: str, seqlen: int) -> float:
    """Perplexity by the host model's own loss, each chunk written as BOS and a piece of the text."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    room, losses = seqlen - 1, []
    for start in range(0, len(ids) - room + 1, room):
        chunk = torch.tensor([[BOS, *ids[start : start + room]]])
        with torch.no_grad():
            losses.append(loaded.model(input_ids=chunk, labels=chunk).loss.item())
    return math.exp(sum(losses) / len(losses))


def test_perplexity_of_a_model_with_bos_has_bos_in_every_chunk(
    model_with_bos, held_out_file, tmp_path, capsys
) -> None:
    loaded = load_model(model_with_bos)
    expected = by_hand(loaded, held_out_file.read_text(), 64)
    assert text_perplexity(loaded, str(held_out_file)) == pytest.approx(expected, rel=1e-5)
    bare = dataclasses.replace(loaded, tokenizer=load_model(model_with_bos).tokenizer)
    bare.tokenizer.backend_tokenizer.post_processor = None
    assert text_perplexity(bare, str(held_out_file)) != pytest.approx(expected, rel=1e-3)

    config = EvalConfig(
        model=str(model_with_bos), text=(str(held_out_file),), out=str(tmp_path / "eval")
    )
    report = evaluate(config)
    note = "every sample and chunk starts with <|end|>, as the tokenizer puts it"
    assert note in capsys.readouterr().err
    assert note in report.notes
    (value,) = report.rows[0].metrics[f"perplexity {held_out_file.name}"]
    assert value == pytest.approx(expected, rel=1e-5)


def test_quantize_calibrates_and_measures_with_bos(
    model_with_bos, text_file, held_out_file, tmp_path, capsys, monkeypatch
) -> None:
    read = []
    calibrate = quantize_command.calibrate_saved
    monkeypatch.setattr(
        quantize_command, "calibrate_saved", lambda job: (read.append(job.samples), calibrate(job))
    )
    config = QuantizeConfig(
        model=str(model_with_bos), calib=(str(text_file),), eval_text=(str(held_out_file),),
        out=str(tmp_path / "w4"), nsamples=4, seqlen=48, group_size=32, format="dense",
    )  # fmt: skip
    report = quantize_command.quantize(config)

    # Samples have the length that was asked for, BOS included, and hold no other.
    (samples,) = read
    assert samples.shape == (4, 48)
    assert (samples[:, 0] == BOS).all()
    assert BOS not in samples[:, 1:]

    # The report's perplexities are those that eval measures.
    full, result = (
        row.metrics[f"perplexity {held_out_file.name}"][0]
        for row in (report.rows[0], report.rows[-1])
    )
    for folder, value in ((model_with_bos, full), (tmp_path / "w4", result)):
        loaded = load_model(folder, allow_rounded=True)
        assert by_hand(loaded, held_out_file.read_text(), 64) == pytest.approx(value, rel=1e-5)

    # The log, the report and the card say how samples begin.
    words = "every sample and chunk starts with <|end|>, as the tokenizer puts it"
    assert words in capsys.readouterr().err
    assert words in report.notes
    assert words.replace("<", "\\<") in (tmp_path / "w4" / "README.md").read_text()


def test_sensitivity_reads_chunks_with_bos(
    model_with_bos, held_out_file, tmp_path, monkeypatch
) -> None:
    read = []
    measure = sensitivity_command.measure
    monkeypatch.setattr(
        sensitivity_command,
        "measure",
        lambda decoder, tokens, *rest, **more: (
            read.append(tokens),
            measure(decoder, tokens, *rest, **more),
        )[1],
    )
    config = SensitivityConfig(
        model=str(model_with_bos), text=(str(held_out_file),), group_size=32,
        out=str(tmp_path / "s"), nsamples=3,
    )  # fmt: skip
    report = sensitivity_command.sensitivity(config)
    assert read[0].shape[1] == 64
    assert (read[0][:, 0] == BOS).all()
    assert any("starts with <|end|>" in note for note in report.notes)
