"""The drawn images, the arms and the demo's parts."""

import pytest
import torch
from scalekd_tiny import STUDENTS, tiny_teacher
from torch import nn

from effml_common.errors import InputError
from effml_common.report import resolve
from scalekd import TeacherSplit
from scalekd.demo.arms import BASELINES, SCALEKD, dist_loss, make_task
from scalekd.demo.data import (
    CLASSES,
    Images,
    draw_images,
    read_digits,
    shift_images,
    training_images,
)
from scalekd.demo.models import build_demo_student, build_demo_teacher
from scalekd.demo.plots import plot
from scalekd.demo.tables import claims_of, rows_of
from scalekd.demo.training import check_teacher_lead, train_arm
from scalekd.method.metrics import top1_percent


def test_images_repeat_with_their_seed_and_are_roughly_normal() -> None:
    (x, y), (again, _) = (draw_images(600, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(x, again)
    assert x.shape == (600, 3, 16, 16)
    assert x.mean().abs() < 0.05
    assert 0.8 < x.std() < 1.2
    assert y.unique().tolist() == list(range(CLASSES))


@pytest.mark.parametrize("kind", ["cnn", "mlp", "vit"])
@pytest.mark.parametrize("arm", [*BASELINES, *SCALEKD])
def test_every_arm_trains_every_student(arm: str, kind: str) -> None:
    if arm == "mixup":
        pytest.skip("mixed labels come from the loop")
    teacher = build_demo_teacher(16, CLASSES).eval()
    task = make_task(arm, build_demo_student(kind, CLASSES, 0), teacher).train()
    x, y = draw_images(4, torch.Generator().manual_seed(0))
    task(x, y)["loss"].backward()
    trained = [p for p in task.parameters() if p.requires_grad and p.grad is not None]
    assert trained
    assert not any(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("arm", ["kd", "dist", "fitnet", "timm features", "cap"])
def test_strength_multiplies_the_distillation_term_alone(arm: str) -> None:
    teacher = build_demo_teacher(16, CLASSES).eval()
    x, y = draw_images(4, torch.Generator().manual_seed(0))

    def loss(strength: float) -> float:
        torch.manual_seed(1)  # of projectors
        student = build_demo_student("mlp", CLASSES, 0)
        return float(make_task(arm, student, teacher, strength).train()(x, y)["loss"].detach())

    none, single, triple = loss(0.0), loss(1.0), loss(3.0)
    assert triple - none == pytest.approx(3 * (single - none), rel=1e-4)
    labels = float(
        nn.functional.cross_entropy(build_demo_student("mlp", CLASSES, 0)(x), y).detach()
    )
    assert none == pytest.approx(labels * (0.5 if arm == "kd" else 1.0), rel=1e-5)


def test_digits_are_split_without_overlap_and_normalised() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    (x, y), (held_out, labels) = read_digits("train"), read_digits("test")
    assert (len(y), len(labels)) == (1297, 500)
    assert x.shape == (1297, 3, 16, 16)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(held_out.std()) == pytest.approx(1, abs=1e-4)
    counts = torch.bincount(y) + torch.bincount(labels)
    assert counts.tolist() == torch.bincount(torch.from_numpy(data.target)).tolist()


def test_a_few_epochs_lift_a_student_above_chance() -> None:
    teacher = build_demo_teacher(16, CLASSES).eval()
    images = training_images(100, 1)
    student = train_arm("mixup", "cnn", teacher, images, epochs=1, rate=1e-3, seed=0)
    assert not student.training
    student = train_arm("alone", "cnn", teacher, images, epochs=25, rate=1e-2, seed=0)
    assert top1_percent(student, images.x, images.y) > 25  # chance is 8


def test_a_shift_moves_by_whole_pixels_within_bounds() -> None:
    x = torch.arange(2 * 64).float().view(2, 1, 8, 8)
    moved = shift_images(x, torch.Generator().manual_seed(1), most=2)
    assert moved.shape == x.shape
    padded = nn.functional.pad(x, (2,) * 4, mode="reflect")
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    for image, own in zip(moved, windows, strict=True):
        assert (own == image[:, None, None]).all(dim=(-1, -2)).any()


def test_dist_is_one_minus_pearson_along_both_axes() -> None:
    np = pytest.importorskip("numpy")
    s, t = torch.randn(2, 6, 5, dtype=torch.float64)
    ps, pt = s.softmax(-1).numpy(), t.softmax(-1).numpy()
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps, pt, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps.T, pt.T, strict=True)])
    assert dist_loss(s, t).item() == pytest.approx(rows + columns, abs=1e-6)


def test_a_teacher_too_close_to_the_student_is_refused() -> None:
    check_teacher_lead(90.0, 87.0)
    with pytest.raises(InputError, match=r"the teacher has 90\.0 % and the student alone 88\.0 %"):
        check_teacher_lead(90.0, 88.0)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(InputError, match="there is no arm magic; use one of alone, mixup"):
        make_task("magic", STUDENTS["vit"](), tiny_teacher())


def test_claims_pair_seeds_and_name_the_best_baseline(tmp_path) -> None:
    table = {
        ("alone", "cnn", "w32"): {1: 50.0, 2: 51.0, 3: 52.0},
        ("kd", "cnn", "w32"): {1: 60.0, 2: 61.0, 3: 62.0},
        ("scalekd", "cnn", "w32"): {1: 65.0, 2: 66.5, 3: 66.0},
        ("scalekd", "cnn", "w64"): {1: 66.0, 2: 66.0, 3: 67.0},
        ("cap+dfm+tpp", "cnn", "untrained"): {1: 40.0, 2: 41.0, 3: 43.0},
    }
    claims = {claim.id: claim for claim in claims_of(table)}
    assert claims["best-cnn"].text == "cnn: scalekd is above kd (the best baseline)"
    assert list(claims["best-cnn"].gaps) == [5.0, 5.5, 4.0]
    assert resolve(claims["best-cnn"].gaps)[2] == "yes"
    assert resolve(claims["untrained-cnn"].gaps)[2] == "no"
    assert claims["size-cnn-w64"].text == "cnn: a teacher of width 64 helps more than one of 32"
    assert [row.name for row in rows_of(table)][:2] == ["alone", "kd"]
    pytest.importorskip("matplotlib")
    assert {path.name for path in plot(table, tmp_path)} == {
        "scalekd-methods.png",
        "scalekd-teachers.png",
    }


def test_the_demo_writes_its_report(tmp_path, monkeypatch) -> None:
    from scalekd.config import DemoConfig
    from scalekd.demo import report as demo

    monkeypatch.setattr(
        demo, "load_or_train_teacher", lambda **_: build_demo_teacher(16, CLASSES).eval()
    )
    monkeypatch.setattr(demo, "check_teacher_lead", lambda *_: None)
    monkeypatch.setattr(demo, "ARMS", ("alone", "scalekd"))
    monkeypatch.setattr(demo, "test_images", lambda _: Images(*draw_images(250, torch.Generator())))
    report = demo.demo(
        DemoConfig(labelled=100, epochs=1, students=("mlp",), out=str(tmp_path / "demo"))
    )
    assert {row.name for row in report.rows} == {"alone", "scalekd"}
    assert (tmp_path / "demo" / "run" / "report.html").is_file()


def test_the_demo_teacher_replays() -> None:
    split = TeacherSplit.from_timm(build_demo_teacher(16, CLASSES).eval())
    assert split.check_replay(torch.randn(1, 3, 16, 16)) < 1e-5
