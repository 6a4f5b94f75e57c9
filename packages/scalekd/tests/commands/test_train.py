"""What a user does with a folder of images, through the command line."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from scalekd_runs import STUDENT, TEACHER, WORDS, make_photos, metrics_of, scalekd

from effml_common.stopping import StopSignal


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert scalekd("train", "--data-dir", photos, *WORDS, "--ema", "0.9", "--out", out) == 0
    return out


def test_training_is_one_command_and_logs_every_term(trained: Path) -> None:
    lines = metrics_of(trained)
    assert [line["step"] for line in lines] == list(range(1, 9))
    terms = {"loss", "task_loss", "kd_loss", "spat_s3", "ac_s3", "spat_s4", "ac_s4", "lr"}
    assert terms <= set(lines[0])
    total = 0.5 * lines[0]["task_loss"] + 0.5 * lines[0]["kd_loss"]
    total += 4.1 * (lines[0]["spat_s3"] + lines[0]["spat_s4"])
    total += 2.05 * (lines[0]["ac_s3"] + lines[0]["ac_s4"])
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)
    shares = [value for name, value in lines[0].items() if name.startswith("share_")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    report = json.loads((trained / "run" / "report.json").read_text())
    assert set(report["rows"][0]["metrics"]) == {"top1", "top5", "loss"}


def test_the_student_loads_with_timm_and_holds_nothing_of_the_training(trained: Path) -> None:
    file = trained / "student.safetensors"
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, checkpoint_path=str(file), **STUDENT
    )
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=3, **STUDENT)
    assert set(load_file(file)) == set(fresh.state_dict())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_eval_agrees_with_the_accuracy_that_training_ended_with(trained, photos, capsys) -> None:
    assert scalekd("eval", trained, "--data-dir", photos, "--workers", "0", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["rows"][0]
    ended = json.loads((trained / "run" / "report.json").read_text())["rows"][0]
    assert measured["setting"] == "averaged weights"
    assert measured["metrics"] == ended["metrics"]


@pytest.mark.parametrize("flag", ["--use-ema", "--no-use-ema"])
def test_export_is_verified_by_timm_to_zero(flag, trained, tmp_path, capsys) -> None:
    file = tmp_path / "student.safetensors"
    assert scalekd("export", trained, flag, "--out", file, "--verify", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["largest_gap"] == 0
    namespace = {"timm": timm}
    loaded = eval(result["load_with"], namespace)
    assert set(loaded.state_dict()) == set(load_file(file))
    same = all(
        torch.equal(v, load_file(trained / "student.safetensors")[k])
        for k, v in load_file(file).items()
    )
    assert same == (flag == "--use-ema")


def test_loss_terms_fall(photos, tmp_path) -> None:
    out = tmp_path / "run"
    words = ["--epochs", "24", "--lr", "5e-3", "--recipe", "adv-vit", "--ema", "0"]
    words += ["--min-crop", "0.9"]  # 96 updates on nearly the same images
    assert scalekd("train", "--data-dir", photos, *WORDS, *words, "--out", out) == 0
    lines = metrics_of(out)
    for term in ("spat_s3", "ac_s3", "spat_s4", "ac_s4"):
        # The mean of six epochs at the end, because a single one is noisy.
        first = sum(line[term] for line in lines[:4])
        assert sum(line[term] for line in lines[-24:]) / 6 < 0.97 * first, term


class Stop(StopSignal):
    """A signal that arrives after a number of updates."""

    after = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @property
    def requested(self) -> bool:
        self.seen += 1
        if self.seen > self.after and self._signum is None:
            self._signum = 15
        return self._signum is not None


# Within an epoch, at its end.
@pytest.mark.parametrize("after", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_to_the_same_bits(after, photos, tmp_path, monkeypatch) -> None:
    words = ["--ema", "0.9", "--drop-path", "0.2", "--grad-accum", "2", "--recipe", "adv-vit"]
    words = ["train", "--data-dir", photos, *WORDS, *words]
    assert scalekd(*words, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "after", after)
        patch.setattr("scalekd.training.trainer.StopSignal", Stop)
        assert scalekd(*words, "--out", tmp_path / "cut", "--save-every", "100") == 143
    # The last line of the interrupted run is the update it was stopped after.
    assert metrics_of(tmp_path / "cut")[-1]["step"] == after + 1
    assert scalekd(*words, "--out", tmp_path / "cut", "--resume", "auto") == 0
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    for name in ("run/checkpoints/step-8/model.safetensors", "student.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_run_is_not_continued_with_another_pair(trained, photos, capsys) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--ema", "0.9", "--out", trained]
    assert scalekd(*words, "--resume", "auto", "--w-full", "1", "--tau", "2") == 2
    error = capsys.readouterr().err
    assert "was made with w_full None, not 1.0; resume with the same settings" in error


def test_a_finished_run_is_not_overwritten(trained, photos, capsys) -> None:
    assert scalekd("train", "--data-dir", photos, *WORDS, "--out", trained) == 2
    assert (
        "holds student.safetensors of an earlier run; choose another --out, or add --resume auto"
        in capsys.readouterr().err
    )


def test_gradient_accumulation_equals_the_large_batch(photos, tmp_path) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--epochs", "1", "--lr", "1e-4"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, parts in zip(outs, ("1", "2"), strict=True):
        assert scalekd(*words, "--grad-accum", parts, "--out", out) == 0
    first, second = (metrics_of(out)[0]["grad_norm"] for out in outs)
    assert first == pytest.approx(second, rel=1e-6)
    one, two = (load_file(out / "student.safetensors") for out in outs)
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def test_bfloat16_and_mixup_train(photos, tmp_path) -> None:
    words = ["--amp", "bf16", "--mixup", "0.2", "--cutmix", "1", "--channels-last", "--epochs", "1"]
    assert scalekd("train", "--data-dir", photos, *WORDS, *words, "--out", tmp_path / "run") == 0


def test_two_names_and_a_path_are_enough_for_a_pretrained_start(photos, tmp_path) -> None:
    start = timm.create_model("vit_tiny_patch16_224", num_classes=3, **STUDENT)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    words = ["--student-checkpoint", tmp_path / "start.pt", "--lr", "1e-12", "--epochs", "1"]
    assert scalekd("train", "--data-dir", photos, *WORDS, *words, "--out", tmp_path / "run") == 0
    ended = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.allclose(v, ended[k], atol=1e-6) for k, v in start.state_dict().items())


def test_training_from_a_cache_equals_the_live_teacher(photos, tmp_path) -> None:
    words = ["--data-dir", photos, *WORDS, "--lr", "1e-4"]
    torch.rand(3)  # the teacher's random weights come from --seed, whatever was drawn before
    assert scalekd("cache", *words, "--views", "2", "--out", tmp_path / "cache") == 0
    out = tmp_path / "cached"
    assert scalekd("train", *words, "--cache", tmp_path / "cache", "--out", out) == 0
    from scalekd.training.cache import TeacherCache

    # The same crops with the live teacher: only the cache's half precision may differ.
    live, original = tmp_path / "live", TeacherCache.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherCache, "__call__", lambda *_: None)
        assert scalekd("train", *words, "--cache", tmp_path / "cache", "--out", live) == 0
    assert TeacherCache.__call__ is original
    for ours, theirs in zip(metrics_of(out), metrics_of(live), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "5"], "seed"),
        (["--tail-blocks", "1"], "tail"),
        (["--min-crop", "0.5"], "transform"),
        (["--teacher-args", json.dumps({**TEACHER, "init_values": 0.1})], "teacher weights"),
    ],
)
def test_a_cache_of_other_settings_is_refused(change, named, photos, tmp_path, capsys) -> None:
    words = ["--data-dir", photos, *WORDS]
    assert scalekd("cache", *words, "--views", "1", "--out", tmp_path / "cache") == 0
    words += ["--cache", tmp_path / "cache", "--out", tmp_path / "run", *change]
    assert scalekd("train", *words) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'cache'} was made with another " in error
    assert named in error


def test_a_damaged_shard_is_named(photos, tmp_path, capsys) -> None:
    words = ["--data-dir", photos, *WORDS]
    assert scalekd("cache", *words, "--views", "1", "--out", tmp_path / "cache") == 0
    shard = tmp_path / "cache" / "view-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert scalekd("train", *words, "--cache", tmp_path / "cache", "--out", tmp_path / "run") == 2
    assert (
        "view-0.safetensors is missing or damaged; run scalekd cache again"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_real_digits_are_learned_from_a_folder(tmp_path) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    from PIL import Image

    counts = dict.fromkeys((0, 1, 7), 0)
    for image, label in zip(digits.images, digits.target, strict=True):
        if label in counts and counts[label] < 140:
            split = "train" if counts[label] < 100 else "val"
            folder = tmp_path / "digits" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((image * 15.9).astype("uint8")).resize((32, 32))
            pixels.save(folder / f"{counts[label]}.png")
            counts[label] += 1
    words = ["--student", "test_resnet", "--student-args", "{}", "--epochs", "16", "--lr", "2e-3"]
    words += ["--recipe", "adv-vit", "--ema", "0", "--kd-alpha", "0", "--w-full", "0.1"]
    words += ["--w-ac", "0.1", "--min-crop", "0.8"]
    out = tmp_path / "run"
    assert scalekd("train", "--data-dir", tmp_path / "digits", *WORDS, *words, "--out", out) == 0
    report = json.loads((out / "run" / "report.json").read_text())
    assert report["rows"][0]["metrics"]["top1"]["mean"] > 45  # chance is 33


def test_an_interrupted_run_is_not_begun_anew_in_its_folder(photos, tmp_path, capsys) -> None:
    """Its checkpoints would later be taken for those of the new run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert scalekd("train", "--data-dir", photos, *WORDS, "--out", tmp_path) == 2
    assert "holds run/checkpoints of an earlier run; choose another" in capsys.readouterr().err
