"""lm-eval tasks from local files against what the model itself says."""

import json
import math
from pathlib import Path

import pytest
import torch

from effml_common.errors import InputError
from sliderquant.adapters.harness import read_tasks, run_tasks

QUESTIONS = [
    {"q": "import os", "choices": ["\ndef ", " path walk", "zzzz qqq"], "gold": 0},
    {"q": "for x in", "choices": [" range", ")))(", " %%%"], "gold": 1},
    {"q": "return", "choices": [" None", " value here", "\n\n\n"], "gold": 2},
    {"q": "class Thing", "choices": ["(object):", "!!!", " for"], "gold": 0},
]
TEXTS = [{"text": "import os\n\ndef f(x):\n    return x\n"}, {"text": "x = 1\n" * 10}]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs:
  data_files: {test: questions.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
metadata: {version: 3.0}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files: {test: texts.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "rolling.yaml").write_text(ROLLING)
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def log_probability(loaded, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = loaded.model(torch.tensor([context + continuation])).logits[0].double()
    log_p = logits.log_softmax(-1)[len(context) - 1 : -1]
    return sum(log_p[k, token].item() for k, token in enumerate(continuation))


@pytest.mark.parametrize("begins", [False, True], ids=["bare", "bos"])
def test_tasks_report_what_the_models_own_probabilities_say(
    begins, loaded, tasks, with_begin
) -> None:
    """The harness encodes as the tokenizer does: where that puts BOS in front, a context has it."""
    if begins:
        with_begin(loaded.tokenizer)
        assert loaded.tokenizer("x")["input_ids"][0] == loaded.tokenizer.bos_token_id
    choice, rolling = run_tasks(
        loaded.model, loaded.tokenizer, read_tasks([str(tasks)]), batch_size=2
    )
    right = 0
    for row in QUESTIONS:
        whole = [loaded.tokenizer(row["q"] + one)["input_ids"] for one in row["choices"]]
        start = len(loaded.tokenizer(row["q"])["input_ids"])
        scores = [log_probability(loaded, ids[:start], ids[start:]) for ids in whole]
        right += scores.index(max(scores)) == row["gold"]
    assert choice.name == "choice v3.0"
    assert choice.samples == 4
    assert choice.metrics == {"acc": right / 4}
    p = right / 4
    assert choice.stderrs["acc"] == pytest.approx(math.sqrt(p * (1 - p) / 3))

    total = size = 0.0
    for row in TEXTS:
        ids = loaded.tokenizer(row["text"])["input_ids"]
        assert len(ids) < loaded.context  # one window
        total += log_probability(loaded, [loaded.tokenizer.eos_token_id], ids)
        size += len(row["text"].encode())
    assert rolling.metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert rolling.metrics["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)


def test_a_limit_reads_fewer_documents(loaded, tasks) -> None:
    (found,) = run_tasks(
        loaded.model, loaded.tokenizer, read_tasks([str(tasks / "choice.yaml")]), limit=2
    )
    assert found.samples == 2


BAD = {
    "": "is no lm-eval task",
    "task: [": "cannot be read",
    "dataset_path: json": "is no lm-eval task",
    CHOICE.replace("dataset_path: json", "dataset_path: cais/mmlu"): "not read from local files",
    CHOICE.replace("questions", "missing"): "does not exist",
    CHOICE.replace("  data_files: {test: questions.jsonl}", "  x: 1"): "names no data",
    CHOICE + "process_docs: !function utils.f": "run Python code",
    CHOICE + "include: other.yaml": "write the task in one file",
}


@pytest.mark.parametrize("text", BAD)
def test_a_task_file_that_will_not_run_is_refused_before_the_model_loads(text, tasks) -> None:
    (tasks / "choice.yaml").write_text(text)
    with pytest.raises(InputError, match=BAD[text]):
        read_tasks([str(tasks)])


def test_missing_empty_and_repeated_tasks_are_refused(tasks, tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_tasks([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no YAML"):
        read_tasks([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="choice is defined twice"):
        read_tasks([str(tasks), str(tasks / "choice.yaml")])


def test_a_task_that_does_not_fit_its_data_is_one_line(loaded, tasks) -> None:
    (tasks / "choice.yaml").write_text(CHOICE.replace("doc_to_choice: choices", "doc_to_choice: c"))
    with pytest.raises(InputError, match="lm-eval cannot run the tasks"):
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks / "choice.yaml")]))
