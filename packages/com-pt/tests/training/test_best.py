"""Evaluation within a stage: it changes no bit of training, and the best model can be handed over."""

import json
import math
from pathlib import Path

import pytest
import torch
from com_pt_tiny import clip, clip_chain, clip_data, spec
from safetensors.torch import load_file

from com_pt.training.best import BestModel
from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.clip import ClipTask
from com_pt.training.trainer import StageTrainer
from effml_common.errors import ConfigError

SCRIPT = [0.1, 0.7, 0.4, 0.7, 0.2, 0.3]  # of the second stage, after 2, 4, ... updates


class Judged(ClipTask):
    """Draws random numbers while it judges, and gives what the script says."""

    headline = "score"

    def __init__(self, data, script) -> None:
        super().__init__(data)
        self.script, self.seen = list(script), []

    def evaluate(self, model):
        assert not model.training
        torch.rand(7)
        self.seen.append({name: v.clone() for name, v in model.state_dict().items()})
        return {"score": self.script[(len(self.seen) - 1) % len(self.script)]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def run(pictures: Path, out: Path, script=SCRIPT, **more) -> tuple[Judged, list]:
    task = Judged(clip_data(pictures), script)
    document = clip_chain(pictures, 32, epochs=2, log_every=3, **more)
    return task, run_chain(parse_chain(document), out, task=task)


def test_judging_within_a_stage_changes_no_bit_of_training(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "plain")
    task, members = run(pictures, tmp_path / "judged", eval_every=2)
    plain, judged = weights(tmp_path / "plain" / "W32"), weights(tmp_path / "judged" / "W32")
    assert all(torch.equal(plain[name], value) for name, value in judged.items())
    # After every second of twelve updates; the end is not judged a second time.
    assert len(task.seen) == 6
    assert members[0].metrics == {"score": SCRIPT[-1]}
    file = tmp_path / "judged/run/stage-1-W32/metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["step"]: line.get("val score") for line in lines} == {
        2: 0.1, 3: None, 4: 0.7, 6: 0.4, 8: 0.7, 9: None, 10: 0.2, 12: 0.3,
    }  # fmt: skip
    assert all("loss" in line for line in lines)


@pytest.mark.parametrize(("better", "update"), [("higher", 4), ("lower", 2)])
def test_the_best_model_is_kept_with_its_update_and_handed_over(
    better, update, pictures, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Judged, "headline_is_better", better)
    task, members = run(pictures, tmp_path / "out", eval_every=2, keep="best")
    best = tmp_path / "out/run/stage-1-W32/best"
    record = json.loads((best / "best.json").read_text())
    value = SCRIPT[update // 2 - 1]
    assert record == {
        "step": update,
        "metric": "score",
        "value": value,
        "metrics": {"score": value},
    }
    assert members[0].metrics == {"score": value}
    expected = task.seen[update // 2 - 1]
    for folder in (best, tmp_path / "out" / "W32"):
        assert all(torch.equal(expected[name], v) for name, v in weights(folder).items())
    assert [*(tmp_path / "out/run/stage-1-W32").glob(".tmp-*")] == []


def test_a_kill_between_two_renames_loses_no_best_model(pictures, tmp_path) -> None:
    task = Judged(clip_data(pictures), SCRIPT)
    best = BestModel(task, spec(32), tmp_path / "best")
    best.offer(clip(32), 1, {"score": 0.5})
    (tmp_path / "best").rename(tmp_path / ".tmp-best-old")
    best.offer(clip(32), 2, {"score": 0.4})
    assert (best.read() or {})["step"] == 1


def test_keeping_the_best_needs_evaluations_of_the_headline(pictures, tmp_path) -> None:
    with pytest.raises(ConfigError, match="keep is best and nothing is evaluated; set eval_every"):
        parse_chain(clip_chain(pictures, 32, keep="best"))
    document = clip_chain(pictures, 32, keep="best", eval_every=5, epochs=0.5)
    with pytest.raises(ConfigError, match="no evaluation measured zero-shot top-1; give held-out"):
        run_chain(parse_chain(document), tmp_path / "out")
    assert CausalLMTask.headline_is_better == "lower"
    assert ClipTask.headline_is_better == "higher"


def test_a_sink_gets_every_logged_step_with_its_stage(pictures, tmp_path) -> None:
    seen = []
    chain = parse_chain(clip_chain(pictures, 32, 48, epochs=0.5, log_every=2))
    run_chain(chain, tmp_path / "out", sink=lambda step, metrics: seen.append((step, metrics)))
    assert [(step, metrics["stage"]) for step, metrics in seen] == [
        (2, "W32"), (3, "W32"), (2, "W48"), (3, "W48"),
    ]  # fmt: skip
    lines = (tmp_path / "out/run/stage-2-W48/metrics.jsonl").read_text().splitlines()
    assert [{"step": s, **m} for s, m in seen[2:]] == [
        {**json.loads(line), "stage": "W48"} for line in lines
    ]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_value_that_is_nan_is_never_the_best(better, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Judged, "headline_is_better", better)
    best = BestModel(Judged(clip_data(pictures), SCRIPT), spec(32), tmp_path / "best")
    for step, value in enumerate([math.nan, 0.5, math.nan], 1):
        best.offer(clip(32), step, {"score": value})
    assert (best.read() or {})["step"] == 2


def test_a_stage_that_begins_again_forgets_the_best_of_its_first_beginning(
    pictures, tmp_path, monkeypatch
) -> None:
    """Killed before its first checkpoint, and continued with other settings."""
    step = StageTrainer._step

    def killed(self, number, *args):
        if number == 6:
            raise KeyboardInterrupt
        return step(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, tmp_path / "out", eval_every=2, keep="best")
    task = Judged(clip_data(pictures), [0.1, 0.2, 0.3])
    document = clip_chain(pictures, 32, epochs=1, log_every=3, lr=1e-4, eval_every=2, keep="best")
    chain = parse_chain(document)
    [member] = run_chain(chain, tmp_path / "out", task=task, resume=True, force=True)
    assert member.metrics == {"score": 0.3}
