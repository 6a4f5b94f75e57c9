"""The examples run as they are written, on tiny models, and come out as they say."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scalekd_runs import make_photos

from scalekd.commands.inspect import inspect
from scalekd.config import InspectConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "choose_teacher_by_cost",
    "compare_scalekd_with_timm_features",
    "distil_own_network_from_swin",
    "distil_resnet_from_dinov2_features",
    "distil_resnet_from_swin",
}
STUDENT, TEACHER = "test_resnet", "test_vit"
SIZE, CLASSES = 64, 3  # at 32 pixels the last map of the student would be a single position
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
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


def save_teacher(file: Path, **options: Any) -> None:
    """Write weights of a transformer that has learned nothing."""
    save_file(timm.create_model(TEACHER, **options).state_dict(), file)


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


def test_the_resnet_learns_colours_and_its_file_holds_the_student_alone(run, tmp_path) -> None:
    photos = make_photos(tmp_path / "photos")
    save_teacher(tmp_path / "swin.safetensors", num_classes=CLASSES)
    words = (STUDENT, TEACHER, 5, 12, SIZE)
    names = run("distil_resnet_from_swin", photos, "swin.safetensors", *words)
    assert names["top1"] > 60  # chance is 33
    assert {"task_loss", "kd_loss", "spat_s3", "ac_s3", "spat_s4", "ac_s4"} <= set(names["terms"])

    # timm reads the file, and gives what the trained object gives.
    file = str(tmp_path / "resnet.pth")
    loaded = timm.create_model(STUDENT, num_classes=CLASSES, checkpoint_path=file).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(loaded(x), names["student"](x))


def test_features_teach_without_classes_and_a_second_call_goes_on(run, tmp_path) -> None:
    photos = make_photos(tmp_path / "photos")
    save_teacher(tmp_path / "dinov2.safetensors", num_classes=0, img_size=SIZE)
    words = (photos, STUDENT, TEACHER, "dinov2.safetensors", 2, 12, SIZE)
    names = run("distil_resnet_from_dinov2_features", *words)
    metrics = tmp_path / "runs/dinov2/run/metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 6]
    assert "spat_s4" in steps[0]
    assert "kd_loss" not in steps[0]
    file = load_file(tmp_path / "runs/dinov2/student.safetensors")
    assert all(torch.equal(value, file[key]) for key, value in names["model"].state_dict().items())

    # Nothing is left to train.
    again = run("distil_resnet_from_dinov2_features", *words)
    assert again["report"].rows[0].metrics == names["report"].rows[0].metrics


def test_a_network_of_ones_own_learns_from_named_modules(run, tmp_path, capsys) -> None:
    labels = torch.arange(24) % CLASSES
    images = 0.3 * torch.rand(24, 3, 32, 32)
    images[torch.arange(24), labels] += 0.6
    save_file({"images": images, "labels": labels}, tmp_path / "images.safetensors")
    save_teacher(tmp_path / "swin.safetensors", num_classes=CLASSES, img_size=32)

    words = ("images.safetensors", "swin.safetensors", TEACHER, 30, 12, 32)
    names = run("distil_own_network_from_swin", *words)
    weights = torch.load(tmp_path / "own-network.pt", weights_only=True)
    assert {key.split(".")[0] for key in weights} == {"stem", "middle", "last", "head"}
    names["student"].load_state_dict(weights)
    assert (names["student"](images).argmax(1) == labels).float().mean() > 0.9
    assert names["task"].plan.shape.student == ((64, (4, 4)), (128, (2, 2)))
    assert "task_loss" in capsys.readouterr().out


def test_the_comparison_judges_three_ways_alike(run, tmp_path, capsys) -> None:
    photos = make_photos(tmp_path / "photos")
    save_teacher(tmp_path / "swin.safetensors", num_classes=CLASSES, img_size=SIZE)
    words = (STUDENT, TEACHER, 1, 18, SIZE)
    names = run("compare_scalekd_with_timm_features", photos, "swin.safetensors", *words)
    assert list(names["results"]) == ["labels alone", "timm features", "ScaleKD"]
    assert capsys.readouterr().out.count("s of training") == 3

    # The last student once more, over all images that were held out.
    images, labels = zip(*names["val"], strict=True)
    hits = names["student"](torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert names["results"]["ScaleKD"] == pytest.approx(100 * float(hits.float().mean()))
    assert len(labels) == 12


def test_the_costs_are_those_of_the_command(run, capsys) -> None:
    names = run("choose_teacher_by_cost", STUDENT, SIZE, TEACHER)
    assert "times the student alone" in capsys.readouterr().out
    costs = names["costs"][TEACHER]
    described = inspect(InspectConfig(teacher=TEACHER, student=STUDENT, img_size=SIZE)).to_json()
    assert {name: described[name] for name in costs} == costs
