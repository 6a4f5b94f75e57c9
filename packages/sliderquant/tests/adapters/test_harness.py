"""lm-eval tasks from local files against what the model itself says."""

import json
import math
from pathlib import Path

import pytest
import torch

from effml_common.errors import InputError, NonFiniteError
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

    # A rolling text has one token in front, whether the tokenizer puts it there or the harness.
    total = size = 0.0
    for row in TEXTS:
        ids = loaded.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
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
    "[" * 5000: "cannot be read",
    "task: 2020-13-45": "cannot be read",
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
    with pytest.raises(InputError, match="lm-eval cannot run the task choice "):
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks / "choice.yaml")]))


UNFIT = {
    CHOICE.replace("{{q}}", "{{question}}"): "'question' is undefined",
    CHOICE.replace("{{q}}", "{{q"): "unexpected end of template",
    CHOICE.replace("{{q}}", "{{q | shout}}"): "No filter named 'shout'",
    CHOICE.replace("{{q}}", "{{1 // 0}}"): "zero",
    CHOICE.replace("{{q}}", "{{q.strip(1, 2)}}"): "strip",
    CHOICE.replace("test_split: test", "test_split: exam"): "exam",
    CHOICE.replace("metric: acc", "metric: accurate"): "accurate not found",
    CHOICE.replace("multiple_choice", "essay"): "essay",
    CHOICE.replace("doc_to_target: gold", "doc_to_target: 7"): "",
    CHOICE.replace("metric_list:", "metric_list: 3\nx:"): "",
    CHOICE.replace("dataset_path: json", "dataset_path: parquet"): "",
    CHOICE + "filter_list:\n  - name: f\n    filter:\n      - function: wish\n": "wish",
    CHOICE + "no_such_field: 1\n": "no_such_field",
}


@pytest.mark.parametrize("text", UNFIT, ids=range(len(UNFIT)))
def test_whatever_a_task_file_makes_the_harness_raise_is_one_line(text, loaded, tasks) -> None:
    (tasks / "choice.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks)]))
    message = str(caught.value)
    assert message.startswith("lm-eval cannot run the task choice (")
    assert UNFIT[text] in message
    assert message.endswith("); mend its file or its data")
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), RuntimeError("out of memory"), NonFiniteError()]
)
def test_what_is_no_fault_of_the_task_passes(error, loaded, tasks) -> None:
    def fail(*_):
        raise error

    loaded.model.model.register_forward_hook(fail)
    with pytest.raises(type(error)) as caught:
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks)]))
    assert caught.value is error


@pytest.mark.parametrize("begins", [False, True], ids=["bare", "bos"])
@pytest.mark.parametrize("written", ["", "<|end|>"], ids=["plain", "written"])
def test_a_rolling_text_has_bos_once(begins, written, loaded, tasks, with_begin) -> None:
    bare = loaded.tokenizer("import os\n" * 60, add_special_tokens=False)["input_ids"]
    assert len(bare) > 2 * loaded.context  # three windows and more
    record = {"text": written + "import os\n" * 60}
    (tasks / "texts.jsonl").write_text(json.dumps(record) + "\n")
    if begins:
        with_begin(loaded.tokenizer)

    # What the model gets: BOS in front of the first window, then every token but the last.
    received = []
    loaded.model.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    (rolling,) = run_tasks(
        loaded.model, loaded.tokenizer, read_tasks([str(tasks / "rolling.yaml")])
    )
    tokens = torch.cat([row for batch in received for row in batch]).tolist()
    assert tokens.count(loaded.tokenizer.bos_token_id) == 1
    assert tokens[0] == loaded.tokenizer.bos_token_id
    assert len(tokens) >= len(bare)

    # The same text in all four cases, so the same likelihood.
    total, start = 0.0, 0
    while start < len(bare):
        piece = bare[start : start + loaded.context]
        context = [loaded.tokenizer.bos_token_id, *bare[:start]]
        context = context[-(loaded.context + 1 - len(piece)) :]
        total += log_probability(loaded, context, piece)
        start += loaded.context
    size = len(record["text"].encode())
    assert rolling.metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


@pytest.mark.parametrize("name", ["choice", "rolling"])
def test_a_token_beyond_the_embedding_is_refused_in_tasks(name, loaded, tasks) -> None:
    loaded.tokenizer.add_tokens(["<|beyond|>"])
    for path in (tasks / "questions.jsonl", tasks / "texts.jsonl"):
        path.write_text(path.read_text().replace("import os", "import <|beyond|>"))
    with pytest.raises(InputError, match="makes token 384, the model knows 384"):
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks / f"{name}.yaml")]))


def test_tasks_are_found_in_the_home_folder(tasks, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tasks.parent))
    assert [task["task"] for task in read_tasks(["~/tasks"])] == ["choice", "rolling"]


def test_damaged_data_are_named_by_the_cause(loaded, tasks) -> None:
    (tasks / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n{broken\n")
    with pytest.raises(InputError, match=r"the task choice \(.*JSON parse error.*; mend") as caught:
        run_tasks(loaded.model, loaded.tokenizer, read_tasks([str(tasks / "choice.yaml")]))
    assert "\n" not in str(caught.value)
