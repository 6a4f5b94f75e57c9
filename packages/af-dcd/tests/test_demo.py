"""The drawn scenes, the scores, and the demo from start to end at toy size."""

import json
import math

import pytest
import torch

from af_dcd.cli import COMMANDS
from af_dcd.demo_data import CLASSES, draw
from af_dcd.scoring import Scores, outline
from effml_common.cli import main


def test_scenes_are_those_of_their_seed_and_hold_every_class() -> None:
    a, b, c = draw(12, 3), draw(12, 3), draw(12, 4)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.labels, c.labels)
    counts = torch.bincount(draw(60, 0).labels.flatten(), minlength=len(CLASSES))
    assert (counts > 0).all()
    # Imbalance: the ground covers most, the rarest stripes little.
    assert counts[:2].sum() > counts.sum() / 2
    assert counts[9] < counts[2] / 3


def test_crops_cut_image_and_labels_at_the_same_place() -> None:
    scenes = draw(3, 0, side=40)
    marked = type(scenes)(scenes.labels[:, None].float().expand(-1, 3, -1, -1), scenes.labels)
    images, labels = marked.crops(8, 16, torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(images[:, 0], labels.float())


def test_iou_and_its_mean_are_counted_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    guess = torch.tensor([[[0, 1, 1], [1, 0, 0]]])
    scores = Scores(3)
    scores.add(guess, truth)
    assert scores.iou()[:2].tolist() == pytest.approx([1 / 3, 2 / 4])
    assert math.isnan(scores.iou()[2])
    assert scores.mean_iou() == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


def test_the_outline_of_a_square_is_its_rim() -> None:
    mask = torch.zeros(1, 7, 7)
    mask[:, 2:6, 1:5] = 1
    expected = mask.clone()
    expected[:, 3:5, 2:4] = 0
    assert torch.equal(outline(mask), expected)
    assert outline(torch.ones(1, 5, 5)).sum() == 0  # the border of the image is no outline


def test_boundary_f_is_full_for_a_shift_within_the_tolerance_and_none_beyond() -> None:
    truth = torch.zeros(1, 24, 24).long()
    truth[:, 8:16, 8:16] = 1

    def f(shift: int) -> float:
        scores = Scores(2)
        scores.add(truth.roll(shift, 2), truth)
        return scores.boundary_f()

    assert f(0) == f(1) == 100
    assert f(4) < 75


SMALL = ["--teacher-steps", "4", "--teacher-scenes", "4", "--teacher-width", "4"]
SMALL += ["--student-width", "4", "--scenes", "3", "--steps", "3", "--tests", "4", "--batch", "2"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_demo_compares_and_reports(toy, monkeypatch, capsys) -> None:
    monkeypatch.setattr("af_dcd.demo.GATE", -100.0)
    words = ["demo", *SMALL, "--out", str(toy / "out"), "--json", "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in report["rows"]}
    assert {"teacher", "alone", "KD", "full Af-DCD", "alone, equal time"} <= names
    assert {c["holds"] for c in report["claims"]} == {"not resolved"}  # one seed resolves nothing
    for name in ("report.html", "report.json", "metrics.jsonl"):
        assert (toy / "out/run" / name).is_file()
    if report["files"]:
        assert (toy / "out/run/maps.png").stat().st_size > 10_000
    assert list((toy / "cache/effml/af-dcd").glob("teacher-*.safetensors"))


def test_a_teacher_that_is_no_better_ends_the_demo(toy, capsys) -> None:
    words = ["demo", *SMALL, "--out", str(toy / "out"), "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 2
    assert "points above the student alone" in capsys.readouterr().err


def test_equal_seeds_train_equal_students_and_arms_start_from_one_student(toy) -> None:
    from af_dcd.comparison import ARMS, Training
    from af_dcd.config import PairConfig
    from af_dcd.demo_model import Segmenter

    pair = PairConfig(student_width=4, teacher_width=4, batch=2)
    teacher, scenes = Segmenter(4).eval(), draw(2, 0)

    def run(arm, seed: int) -> Training:
        return Training(arm, pair, teacher, scenes, seed, 1e-3, 4)

    starts = [run(arm, 1).student.state_dict() for arm in ARMS]
    assert all(torch.equal(starts[0][k], s[k]) for s in starts for k in s)
    same = []
    for seed in (1, 1, 2):
        training = run(ARMS[-1], seed)
        assert set(training.step()) == {"loss_task", "loss_kd", "loss_fd", "loss_ctr"}
        same.append(training.student.state_dict())
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert any(not torch.equal(same[0][k], same[2][k]) for k in same[0])


def test_bench_measures_both_forms_and_says_where_the_time_goes(tmp_path, capsys) -> None:
    words = ["bench", "--channels", "32", "--student-channels", "8", "--height", "16"]
    words += ["--width", "32", "--repeats", "1", "--out", str(tmp_path), "--json", "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, words) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert set(rows) == {"contrast, chunked", "contrast, naive", "generator and mimicking"}
    assert rows["contrast, naive"]["peak extra MB"]["mean"] > 0
    assert any("generator" in note for note in report["notes"])


@pytest.mark.slow
def test_at_cityscapes_shape_the_chunked_contrast_takes_under_a_fifth_of_the_memory() -> None:
    from af_dcd.bench import peak_of
    from af_dcd.config import BenchConfig

    config, device = BenchConfig(), torch.device("cpu")
    assert peak_of(config, "chunked", device) < peak_of(config, "naive", device) / 5
