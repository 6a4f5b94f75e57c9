"""What only a card shows: training, caching and evaluation on it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from scalekd_runs import WORDS, make_photos, metrics_of, scalekd

from scalekd.demo.data import training_images
from scalekd.demo.models import build_demo_teacher
from scalekd.demo.training import train_arm
from scalekd.method.metrics import top1_percent

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("more", [[], ["--amp", "bf16", "--ema", "0.9", "--mixup", "0.2"]])
def test_a_student_trains_with_loading_processes(more, photos, tmp_path) -> None:
    words = ["--data-dir", photos, *WORDS, "--workers", "2", "--device", "cuda", *more]
    assert scalekd("train", *words, "--out", tmp_path / "run") == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 9))
    # Written for any machine.
    assert all(v.isfinite().all() for v in load_file(tmp_path / "run/student.safetensors").values())


def test_a_cache_made_and_used_with_loading_processes_equals_one_of_the_cpu(
    photos, tmp_path
) -> None:
    losses = {}
    for device in ("cuda", "cpu"):
        words = ["--data-dir", photos, *WORDS, "--lr", "1e-4", "--workers", "2"]
        words += ["--device", device]
        cached, out = tmp_path / f"cache-{device}", tmp_path / f"run-{device}"
        assert scalekd("cache", *words, "--views", "2", "--out", cached) == 0
        assert scalekd("train", *words, "--cache", cached, "--out", out) == 0
        losses[device] = [line["loss"] for line in metrics_of(out)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-3)
    # The crops are the very same, so that the teacher's tokens differ by rounding only.
    shards = [load_file(tmp_path / f"cache-{d}" / "view-1.safetensors") for d in ("cuda", "cpu")]
    assert torch.allclose(*(shard["tokens"].float() for shard in shards), atol=2e-2)


def test_a_run_on_a_card_resumes(photos, tmp_path) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--workers", "2", "--device", "cuda"]
    words += ["--ema", "0.9", "--out", tmp_path / "run", "--resume", "auto"]
    assert scalekd(*words) == 0
    assert scalekd(*words) == 0
    assert metrics_of(tmp_path / "run")[-1]["step"] == 8


def test_evaluation_on_a_card_equals_that_on_the_cpu(photos, tmp_path, capsys) -> None:
    out, found = tmp_path / "run", {}
    words = ["--data-dir", photos, *WORDS, "--device", "cpu", "--out", out]
    assert scalekd("train", *words) == 0
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        words = [out, "--data-dir", photos, "--workers", "2", "--device", device, "--json"]
        assert scalekd("eval", *words) == 0
        found[device] = json.loads(capsys.readouterr().out)["rows"][0]["metrics"]
    assert found["cuda"]["top1"] == found["cpu"]["top1"]
    assert found["cuda"]["loss"]["mean"] == pytest.approx(found["cpu"]["loss"]["mean"], rel=1e-3)


@pytest.mark.parametrize("arm", ["alone", "mixup", "kd", "dist", "fitnet", "scalekd"])
def test_the_arms_of_the_demo_train_on_a_card(arm: str) -> None:
    teacher = build_demo_teacher(16, 12).cuda().eval()
    images = training_images(100, 1)
    student = train_arm(arm, "cnn", teacher, images, epochs=1, rate=1e-3, seed=1)
    assert next(student.parameters()).is_cuda
    assert 0 <= top1_percent(student, images.x, images.y) <= 100
