"""Bad input through the command line: one line that says what was wrong and what to do, exit code 2."""

from pathlib import Path

import pytest
from scalekd_runs import WORDS, make_photos, scalekd

from effml_common.errors import InputError
from scalekd.training.data import CheckedImages


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"), per_class=4)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert scalekd(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def without(words: list[str], flag: str, values: int = 1) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + 1 + values :]


TABLE = [
    (["--num-classes", "2"], "has 3 class folders, but there are 2 classes; set --num-classes"),
    (["--val-split", "test"], "has no folder test; add it, or name another split"),
    (
        ["--data-dir", "nowhere"],
        "nowhere is no folder; give one with train and class folders in it",
    ),
    (["--dataset", "zip/x"], "dataset zip/x is not known; start it with hfds/"),
    (["--teacher", "swin_large"], "timm has no model swin_large; did you mean swin_large"),
    (["--student", "resnet51"], "timm has no model resnet51; did you mean resnet5"),
    (
        ["--batch-size", "64"],
        "12 images are fewer than one batch of 64; lower --batch-size or add images",
    ),
    (["--batch-size", "7", "--grad-accum", "2"], "a batch of 7 cannot be split over 1 processes"),
    (["--teacher-checkpoint", "no.pt"], "there is no file no.pt; check the path"),
    (["--student-args", "{"], "is no JSON"),
    (["--student-args", "[1]"], "is no JSON object"),
    (["--student-args", '{"wings": 2}'], "timm cannot build vit_tiny_patch16_224"),
    (
        ["--heads", "5", "7"],
        "5 heads do not divide the 24 channels of s3; use one of 1, 2, 3, 4, 6",
    ),
    (["--heads", "4"], "1 head counts were given; give two, for stages 3 and 4"),
    (["--tail-blocks", "3"], "tail_blocks is 3 but VisionTransformer has 3 blocks; use 1 to 2"),
    (["--kd-alpha", "1"], "kd_alpha is 1.0; give 0 or more and less than 1"),
    (["--tau", "-1"], "tau is -1.0; give a finite number, 0 or more"),
    (["--w-full", "inf"], 'key "w_full": Does not validate'),
    (["--kd-t", "0"], "kd_t is 0.0; give a positive number"),
    (["--epochs", "0"], "epochs is 0; give 1 or more"),
    (["--recipe", "fast"], 'key "recipe": Expected'),
    (["--kd-alhpa", "0"], "there is no flag --kd-alhpa; did you mean --kd-alpha?"),
    (["--cache", "nowhere"], "nowhere is no cache of scalekd; make one with scalekd cache"),
    (["--cache", "x", "--mixup", "1"], "cached teacher outputs do not fit mixed images"),
    (["--min-crop", "0"], "min_crop is 0.0; give more than 0 and at most 1"),
]


@pytest.mark.parametrize(("change", "message"), TABLE, ids=lambda value: str(value)[:30])
def test_train_refuses(change, message, photos, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    words = ["train", "--data-dir", photos, *WORDS, "--out", out, *change]
    assert message in refused(capsys, *words)
    assert not out.exists() or not list(out.rglob("*.safetensors"))


def test_a_teacher_without_learned_weights_is_refused(photos, tmp_path, capsys) -> None:
    words = ["train", "--data-dir", photos, *without(WORDS, "--allow-random-teacher", 0)]
    message = refused(capsys, *words, "--teacher", "mixer_s16_224", "--out", tmp_path / "run")
    assert "timm has no weights for mixer_s16_224; give --teacher-checkpoint" in message
    assert "--allow-random-teacher" in message


def test_no_data_is_refused(capsys) -> None:
    assert "no images are named; add --data-dir DIR" in refused(capsys, "train")


def test_an_empty_class_folder_is_named(tmp_path, capsys) -> None:
    photos = make_photos(tmp_path / "photos", per_class=4)
    (photos / "train" / "dog").mkdir()
    message = refused(capsys, "train", "--data-dir", photos, *WORDS, "--out", tmp_path / "run")
    assert "dog is empty; add images or remove it" in message


def test_a_class_that_one_split_lacks_is_refused_before_it_shifts_labels(tmp_path, capsys) -> None:
    photos = make_photos(tmp_path / "photos", per_class=4)
    (photos / "val" / "ant").rename(tmp_path / "ant")
    message = refused(capsys, "train", "--data-dir", photos, *WORDS, "--out", tmp_path / "run")
    assert "ant of" in message
    assert "is in train but not in val; both need the same class folders" in message


def test_a_label_beyond_the_head_is_refused_with_the_name_of_the_image() -> None:
    class Labelled(list):
        transform = staticmethod(lambda image: image)

    images = CheckedImages(Labelled([("one", 0), ("two", 3)]), 3, skip_bad=False)
    with pytest.raises(InputError, match="number 1 has label 3, but there are 3 classes"):
        images[1]


def test_a_damaged_teacher_file_is_refused(photos, tmp_path, capsys) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(b"0" * 99)
    words = ["train", "--data-dir", photos, *WORDS, "--out", tmp_path / "run"]
    message = refused(capsys, *words, "--teacher-checkpoint", tmp_path / "teacher.safetensors")
    assert "timm cannot build vit_tiny_patch16_224" in message


def test_an_unreadable_image_is_named_or_left_out_on_request(tmp_path, capsys) -> None:
    photos = make_photos(tmp_path / "photos", per_class=4)
    (photos / "train" / "bee" / "1.png").write_bytes(b"no image")
    words = ["train", "--data-dir", photos, *WORDS, "--epochs", "1"]
    message = refused(capsys, *words, "--out", tmp_path / "one")
    assert "1.png cannot be read" in message
    assert "replace it, or --skip-bad" in message
    assert scalekd(*words, "--skip-bad", "--out", tmp_path / "two") == 0
    assert "1.png, 1 so far in this process" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_its_name_and_exit_code_3(
    photos, tmp_path, capsys
) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--lr", "1e30", "--epochs", "3"]
    assert scalekd(*words, "--out", tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert "task_loss" in error or "gradient norm is" in error
    assert "lower the learning rate" in error


def test_a_term_under_one_percent_of_the_loss_is_warned_about(photos, tmp_path, capsys) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--epochs", "1", "--w-ac", "1e-4"]
    assert scalekd(*words, "--out", tmp_path / "run") == 0
    assert "ac_s3 is 0.00 % of the loss; check the weights" in capsys.readouterr().err


def test_eval_and_export_refuse_what_is_no_run(tmp_path, photos, capsys) -> None:
    assert "is no run of train; give its --out folder" in refused(
        capsys, "eval", tmp_path, "--data-dir", photos
    )
    assert "is no run of train" in refused(capsys, "export", tmp_path)
    assert "out is x.pt; end it in .safetensors" in refused(
        capsys, "export", tmp_path, "--out", "x.pt"
    )


def test_the_cache_folder_must_be_empty(tmp_path, photos, capsys) -> None:
    (tmp_path / "file").write_text("x")
    words = ["cache", "--data-dir", photos, *WORDS, "--out", tmp_path]
    assert "is not empty; choose another --out" in refused(capsys, *words)


def test_the_demo_refuses_students_it_does_not_have(capsys) -> None:
    assert "student ['rnn'] is not known; use some of cnn, mlp, vit" in refused(
        capsys, "demo", "--students", "rnn"
    )
