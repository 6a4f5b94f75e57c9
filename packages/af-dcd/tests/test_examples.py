"""The examples run as they are written, on tiny models and images, and come out as they say."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dcd_tiny import fcn, save_weights, write_config, write_images
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "compare_with_logits_distillation_at_equal_time",
    "distil_deeplabv3_r18_in_mmsegmentation",
    "distil_lraspp_from_deeplabv3",
    "distil_segformer_b0_from_b5",
    "predict_cost_of_a_distillation_step",
}
TERMS = {"task", "loss_kd", "loss_fd", "loss_ctr"}
Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not beside these tests"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example in the folder of the test, on the CPU; its global names come back."""

    def run(name: str, *words: Any) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        torch.manual_seed(0)
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


@pytest.fixture
def segformers(tmp_path: Path) -> Path:
    """Folders ``b5`` and ``b0`` with tiny SegFormers of three classes, and stripes in ``data``."""
    transformers = pytest.importorskip("transformers")
    write_images(tmp_path / "data")
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "strides": [4, 2]}
    sizes |= {"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    for name, width in (("b5", 16), ("b0", 8)):
        torch.manual_seed(width)
        config = transformers.SegformerConfig(
            **sizes, hidden_sizes=[width, 2 * width], decoder_hidden_size=4 * width, num_labels=3
        )
        model = transformers.SegformerForSemanticSegmentation(config)
        model.save_pretrained(tmp_path / name)
        size = {"height": 64, "width": 64}
        transformers.SegformerImageProcessor(size=size).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def mmseg_pair(tmp_path: Path) -> Path:
    """Configs of a tiny mmsegmentation pair at crops that fit the method's own settings."""
    pytest.importorskip("mmseg")
    data = write_images(tmp_path / "data", count=2, side=136)
    for name, width in (("student", 2), ("teacher", 4)):
        path = write_config(tmp_path / f"{name}.py", data, fcn(width), side=128)
        path.write_text(path.read_text().replace("max_iters=6, val_interval=6", "max_iters=2"))
    save_weights(tmp_path / "teacher.py", tmp_path / "teacher.pth")
    return tmp_path


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


def test_the_torchvision_student_loads_into_a_plain_model(run, tmp_path) -> None:
    models = pytest.importorskip("torchvision.models")
    write_images(tmp_path / "data")
    shape = {"weights_backbone": None, "num_classes": 3}
    torch.manual_seed(0)
    teacher = models.get_model("deeplabv3_mobilenet_v3_large", **shape)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")

    words = ("data", "teacher.pth", 3, 1, 2, 128, "deeplabv3_mobilenet_v3_large", "none")
    names = run("distil_lraspp_from_deeplabv3", *words)
    assert [set(terms) for terms in names["history"]] == [TERMS]
    weights = torch.load(tmp_path / "student.pth", weights_only=True)

    # The teacher is the one that was given, and stayed so; every weight of the student has moved.
    kept = names["teacher"].state_dict()
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    torch.manual_seed(0)
    plain = models.get_model("lraspp_mobilenet_v3_large", **shape)
    assert not any(torch.equal(p, weights[name]) for name, p in plain.named_parameters())
    plain.load_state_dict(weights)


def test_the_segformer_student_is_a_folder_of_transformers(run, segformers) -> None:
    import transformers

    names = run("distil_segformer_b0_from_b5", "data", "b5", "b0", 8, 2)
    first, last = names["history"]
    assert set(first) == TERMS
    assert last["task"] < first["task"]

    load = transformers.SegformerForSemanticSegmentation.from_pretrained
    before, student = load(segformers / "b0"), load(segformers / "student")
    after = dict(student.named_parameters())
    moved = [not torch.equal(p, after[name]) for name, p in before.named_parameters()]
    assert all(moved)
    assert transformers.SegformerImageProcessor.from_pretrained(segformers / "student")


def test_a_small_segformer_of_other_classes_gets_a_classifier_of_the_teachers(
    run, segformers
) -> None:
    import transformers

    load = transformers.SegformerForSemanticSegmentation.from_pretrained
    config = transformers.SegformerConfig.from_pretrained(segformers / "b0", num_labels=7)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(segformers / "other")
    run("distil_segformer_b0_from_b5", "data", "b5", "other", 1, 2)
    assert load(segformers / "student").config.num_labels == 3


def test_both_ways_are_measured_in_equal_time(run, segformers, capsys) -> None:
    name = "compare_with_logits_distillation_at_equal_time"
    names = run(name, "data", "data", "b5", "b0", 3, 2, 2)
    ways, updates, mious = zip(*names["runs"], strict=True)
    assert ways == ("whole method", "logits only") * 2
    assert updates[0] == updates[2] == 3
    assert min(updates) >= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"seed 1, logits only: {updates[-1]} updates, mIoU {mious[-1]:.1f} %"

    # The mIoU of the last student once more, class by class.
    images, true = (names["data"]["data"][name] for name in ("pixel_values", "labels"))
    assert images.shape == (6, 3, 64, 64)
    with torch.no_grad():
        scores = names["student"](images).logits
    predicted = torch.nn.functional.interpolate(scores, (64, 64), mode="bilinear").argmax(1)
    ious = []
    for k in range(3):
        there, predicted_there = true == k, (predicted == k) & (true != 255)
        ious.append(float((there & predicted_there).sum() / (there | predicted_there).sum()))
    assert mious[-1] == pytest.approx(100 * sum(ious) / 3, rel=1e-5)


@pytest.mark.filterwarnings("ignore:``build_loss`` would be")  # mmseg's own constructors
@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore`` is False")
def test_the_mmsegmentation_student_predicts_without_the_teacher(run, mmseg_pair, capsys) -> None:
    photo = mmseg_pair / "data/images/0.jpg"
    words = ("teacher.pth", photo, "runs/tiny", "student.py", "teacher.py", "hidden=8")
    names = run("distil_deeplabv3_r18_in_mmsegmentation", *words)
    assert names["report"].rows[0].metrics["iterations"] == [2.0]
    assert type(names["model"]).__name__ == "EncoderDecoder"
    assert not any("afdcd" in name for name in names["model"].state_dict())
    with Image.open(mmseg_pair / "prediction.png") as picture:
        colours = {colour for _, colour in picture.getcolors()}
        assert picture.size == (136, 136)
    assert colours <= {(0, 0, 0), (9, 9, 9), (99, 9, 9)}
    assert "mIoU: " in capsys.readouterr().out


def test_the_predicted_costs_follow_from_the_shapes(run, mmseg_pair, capsys) -> None:
    costs = run("predict_cost_of_a_distillation_step", "student.py", "teacher.py")["costs"]
    times = {name: cost["step against a step of logits KD"] for name, cost in costs.items()}
    # Here 256 are more than the teacher's 32 channels.
    assert 1 <= times["the whole method"] < times["with a generator of 256 channels"]

    # The alignment has 16 to 32 channels, the generator two 3x3 convolutions between 32 and 32 or 256.
    align, wide = 16 * 32 + 32, 2 * 9 * 32 * 256 + 256 + 32
    weights = "weights of the branch (dropped at the end)"
    assert costs["the whole method"][weights] == align + 2 * (9 * 32 * 32 + 32)
    assert costs["with a generator of 256 channels"][weights] == align + wide
    assert len(capsys.readouterr().out.splitlines()) == 2
