"""Arms of one seed differ in their terms alone."""

from dataclasses import replace

import pytest
import torch

from af_dcd.demo.data import draw_scenes


@pytest.fixture
def toy(tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_equal_seeds_train_equal_students_and_arms_start_from_one_student(toy) -> None:
    from af_dcd.config import PairConfig
    from af_dcd.demo.arms import ARMS
    from af_dcd.demo.models import Segmenter
    from af_dcd.demo.training import LabelledPair, Training

    config = PairConfig(student_width=4, teacher_width=4, batch=2)
    pair = LabelledPair(config, Segmenter(4).eval(), draw_scenes(2, 0))

    def run(arm, seed: int) -> Training:
        return Training(replace(arm, rate=1e-3), pair, seed, 4)

    starts = [run(arm, 1).student.state_dict() for arm in ARMS]
    assert all(torch.equal(starts[0][k], s[k]) for s in starts for k in s)
    same = []
    for seed in (1, 1, 2):
        training = run(ARMS[-1], seed)
        assert set(training.step()) == {"loss_task", "loss_kd", "loss_fd", "loss_ctr"}
        same.append(training.student.state_dict())
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert any(not torch.equal(same[0][k], same[2][k]) for k in same[0])
