"""Commands, Python and links of the README and of docs/ are what they say."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import sliderquant
from effml_common.cli import main
from sliderquant.adapters.harness import read_tasks
from sliderquant.cli import COMMANDS
from sliderquant.config import QuantizeConfig

PACKAGE = Path(__file__).parents[1]
README = PACKAGE / "README.md"
FORMATS, SETTINGS = PACKAGE / "docs/formats.md", PACKAGE / "docs/settings.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(save, tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model and text under the names that the documents use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    save("llama", hidden_size=128, intermediate_size=128, num_hidden_layers=1).rename(
        "models/llama"
    )
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    Path("models/llama/chat_template.jinja").write_text(template)
    text = Path("text.txt").read_text()
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": text}]}))
    for name in ("notes.txt", "held_out.txt"):
        Path(name).write_text(text)
    return tmp_path


def test_the_commands_of_the_readme_run_one_after_the_other(workplace, capsys) -> None:
    lines = [shlex.split(line) for line in blocks(README, "")[1].splitlines()]
    assert [line[1] for line in lines] == ["quantize", "eval"]
    few = {"quantize": ["--nsamples", "4"], "eval": []}
    for _, verb, *words in lines:
        code = main("sliderquant", "sliderquant", COMMANDS, [verb, *words, *few[verb], "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err

    # The folder has the perplexity that was reported when it was made.
    reported = json.loads((workplace / "models/llama-w4/run/report.json").read_text())["rows"][-1]
    measured = json.loads(out)["rows"][0]
    assert reported["name"] == "compensated rounding"
    want = reported["metrics"]["perplexity held_out.txt"]["mean"]
    assert measured["metrics"]["perplexity held_out.txt"]["mean"] == pytest.approx(want, rel=1e-5)


def test_the_python_of_the_readme_quantizes_and_generates(workplace, monkeypatch, capsys) -> None:
    """With fewer samples; the model and the text are tiny."""
    original = sliderquant.quantize

    def quantize(config):
        return original(dataclasses.replace(config, nsamples=4, device="cpu"))

    monkeypatch.setattr(sliderquant, "quantize", quantize, raising=False)
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    scope: dict = {}
    exec(code, scope)
    weight = scope["model"].model.layers[0].mlp.up_proj.weight.detach()
    assert max(len(row.unique()) for row in weight) <= 16  # groups are as wide as the rows
    assert capsys.readouterr().out.strip()

    # No other setting chooses the method.
    assert scope["config"].method == "compensated"
    with pytest.raises(
        ValueError, match="epochs: not a setting of the method compensated; add --method slider"
    ):
        dataclasses.replace(scope["config"], epochs=21)


def test_the_python_of_the_formats_loads_a_packed_model(workplace) -> None:
    config = QuantizeConfig(
        model="models/llama", calib=("notes.txt",), out="models/llama-w2", wbits=2, group_size=64,
        sym=False, format="native", nsamples=4, device="cpu",
    )  # fmt: skip
    sliderquant.quantize(config)
    (code,) = blocks(FORMATS, "python")
    scope: dict = {}
    exec(code, scope)
    logits = scope["model"](torch.arange(1, 9)[None]).logits
    assert logits.isfinite().all()


def test_the_task_file_of_the_settings_is_accepted(tmp_path) -> None:
    (text,) = blocks(SETTINGS, "yaml")
    (tmp_path / "questions.yaml").write_text(text)
    question = {"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    (task,) = read_tasks([str(tmp_path / "questions.yaml")])
    assert task["task"] == "questions"
    assert yaml.safe_load(text)["doc_to_choice"] in question


def test_every_setting_is_explained() -> None:
    first_column = re.findall(r"^\| (.+?) \|", SETTINGS.read_text(), re.MULTILINE)
    explained = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    assert {field.name for field in dataclasses.fields(QuantizeConfig)} <= explained
