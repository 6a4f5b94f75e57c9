"""Texts given to commands: what is read of them, and by which names reports and cards call them."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effml_common.errors import InputError
from sliderquant.adapters.files import load_model
from sliderquant.adapters.text import encode
from sliderquant.commands import quantize as quantize_command
from sliderquant.commands import sensitivity as sensitivity_command
from sliderquant.commands.eval import evaluate
from sliderquant.config import EvalConfig, QuantizeConfig, SensitivityConfig

PARTS = ["abcde" * 40, "ZYXWV" * 40, "(1,2)" * 40]
RECORDS = [{"text": part} for part in PARTS]


@pytest.fixture
def folder(save, tmp_path, monkeypatch) -> Path:
    """The working folder of a tiny model, whose tokenizer has a token for each character."""
    save("llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize_command, "say", lambda message: None)
    return tmp_path


def settings(**changes) -> dict:
    return {
        "model": "source",
        "out": "out",
        "group_size": None,
        "nsamples": 2,
        "seqlen": 16,
    } | changes


@pytest.fixture
def samples_of(folder, monkeypatch) -> Callable[..., torch.Tensor]:
    """Gives the samples on which ``quantize`` would calibrate."""

    class Enough(Exception):
        pass

    def calibrate(job):
        raise Enough(job.samples)

    outs = (f"out {number}" for number in itertools.count())

    def samples(*calib: str) -> torch.Tensor:
        config = QuantizeConfig(calib=calib, **settings(nsamples=64, out=next(outs)))
        with pytest.raises(Enough) as caught:
            quantize_command.quantize(config)
        return caught.value.args[0]

    monkeypatch.setattr(quantize_command, "calibrate_saved", calibrate)
    return samples


def test_records_of_every_kind_of_file_are_calibrated_on_alike(samples_of) -> None:
    Path("x.txt").write_text("\n\n".join(PARTS))
    expected = samples_of("x.txt")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    for name in ("x.jsonl", "x.JSONL", "x.ndjson"):
        Path(name).write_text("\ufeff" + lines, encoding="utf-8")
        assert torch.equal(samples_of(name), expected), name
    Path("x.json").write_text(json.dumps(RECORDS, indent=1))
    assert torch.equal(samples_of("x.json"), expected)


def test_a_saved_data_set_is_calibrated_on(samples_of) -> None:
    datasets = pytest.importorskip("datasets")
    Path("x.txt").write_text("\n\n".join(PARTS))
    datasets.Dataset.from_list(RECORDS).save_to_disk("saved")
    assert torch.equal(samples_of("saved"), samples_of("x.txt"))


@pytest.fixture
def twins(folder) -> dict[str, str]:
    """Two texts of the same name in two folders."""
    texts = {"a/x.txt": "abcde" * 90, "b/x.txt": "abxde" * 90}
    for name, text in texts.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return texts


def hash_lines(texts) -> list[str]:
    return [
        f"- `{n}` (sha256 `{hashlib.sha256(t.encode()).hexdigest()}`)" for n, t in texts.items()
    ]


def test_card_and_report_of_quantize_name_texts_apart(twins, folder) -> None:
    paths = tuple(str(folder / name) for name in twins)
    config = QuantizeConfig(calib=paths, eval_text=(*paths, "text.txt"), **settings())
    report = quantize_command.quantize(config)
    names = {f"perplexity {name}" for name in (*twins, "text.txt")}
    for row in report.rows:
        assert set(row.metrics) == names | {"bits per weight"}

    # Every value is that of its own text.
    full = report.rows[0].metrics
    for name in (*twins, "text.txt"):
        assert full[f"perplexity {name}"][0] == pytest.approx(by_hand(name), rel=1e-4)

    card, written = Path("out/README.md").read_text(), Path("out/run/report.json").read_text()
    assert all(line in card for line in hash_lines(twins))
    assert str(folder) not in card + written


def by_hand(name: str) -> float:
    """Perplexity of a text by the host model's own loss, in chunks of the model's limit."""
    loaded = load_model("source")
    stream = encode([Path(name).read_text()], loaded.tokenizer)
    pieces = stream[: len(stream) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        losses = [loaded.model(p[None], labels=p[None]).loss.item() for p in pieces]
    return float(torch.tensor(losses).double().mean().exp())


def test_texts_of_calibration_and_measurement_are_named_apart(twins) -> None:
    report = quantize_command.quantize(
        QuantizeConfig(calib=("a/x.txt",), eval_text=("b/x.txt",), **settings())
    )
    assert "perplexity b/x.txt" in report.rows[0].metrics
    assert hash_lines(twins)[0] in Path("out/README.md").read_text()


def test_a_text_that_vanishes_in_the_run_costs_nothing(folder, monkeypatch) -> None:
    data = Path("text.txt").read_text()
    calibrate = quantize_command.calibrate_saved
    monkeypatch.setattr(
        quantize_command, "calibrate_saved", lambda job: (Path("text.txt").unlink(), calibrate(job))
    )
    quantize_command.quantize(
        QuantizeConfig(calib=("text.txt",), eval_text=("text.txt",), **settings())
    )
    assert hash_lines({"text.txt": data})[0] in Path("out/README.md").read_text()


@pytest.mark.parametrize("given", [("a/x.txt", "a/x.txt"), ("a/x.txt", "b/../a/x.txt")])
@pytest.mark.parametrize("setting", ["calib", "eval_text", "text", "sensitivity"])
def test_the_same_file_twice_is_refused_in_every_list(setting, given, twins) -> None:
    runs = {
        "calib": lambda: quantize_command.quantize(QuantizeConfig(calib=given, **settings())),
        "eval_text": lambda: quantize_command.quantize(
            QuantizeConfig(calib=("b/x.txt",), eval_text=given, **settings())
        ),
        "text": lambda: evaluate(EvalConfig(model="source", text=given, out="out")),
        "sensitivity": lambda: sensitivity_command.sensitivity(
            SensitivityConfig(text=given, **settings())
        ),
    }
    with pytest.raises(InputError, match=r"names \S+ twice.*; give it once"):
        runs[setting]()


def test_eval_names_texts_apart(twins, folder) -> None:
    paths = tuple(str(folder / name) for name in twins)
    report = evaluate(EvalConfig(model="source", text=paths, out="out"))
    (row,) = report.rows
    assert set(row.metrics) == {f"perplexity {name}" for name in twins}
    for name in twins:
        assert row.metrics[f"perplexity {name}"][0] == pytest.approx(by_hand(name), rel=1e-4)
    assert str(folder) not in Path("out/run/report.json").read_text()


def test_sensitivity_reads_both_texts_of_one_name(twins, folder, monkeypatch) -> None:
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
    sensitivity_command.sensitivity(
        SensitivityConfig(text=tuple(twins), **settings(nsamples=100, seqlen=30))
    )
    stream = encode(list(twins.values()), load_model("source").tokenizer)
    assert torch.equal(read[0], stream[: 30 * len(read[0])].view(-1, 30))
    assert read[0].numel() > len(twins["a/x.txt"]) + 100


def test_what_helps_a_text_that_is_too_short_is_named(folder) -> None:
    Path("short.txt").write_text("abcde" * 8)
    config = QuantizeConfig(calib=("text.txt",), eval_text=("short.txt",), **settings())
    with pytest.raises(InputError) as caught:
        quantize_command.quantize(config)
    message = str(caught.value)
    assert message.startswith(
        "evaluation text short.txt has 40 tokens, fewer than one chunk of 64; "
    )
    assert "give more text" in message
    assert "lower" not in message

    # What the message advises helps; in the other commands --seqlen does.
    assert "eval --seqlen" in message
    evaluate(EvalConfig(model="source", text=("short.txt",), seqlen=16, out="out"))
    with pytest.raises(InputError, match=r"text short.txt has 40 .* 64; .*lower --seqlen"):
        evaluate(EvalConfig(model="source", text=("short.txt",), out="out"))
    with pytest.raises(InputError, match=r"has 40 tokens, .* chunk of 41; .*lower --seqlen"):
        sensitivity_command.sensitivity(
            SensitivityConfig(text=("short.txt",), **settings(seqlen=41))
        )
    sensitivity_command.sensitivity(SensitivityConfig(text=("short.txt",), **settings()))
