"""Bad input around mmsegmentation: one line, the right exit code, nothing written; and the stand-ins."""

import importlib.util
import json
import os
import pickle
import sys
import time

import pytest
import torch

pytest.importorskip("mmseg")

from dcd_tiny import fcn, save_weights, write_config

from af_dcd.adapters.mmseg import shims
from af_dcd.adapters.mmseg.checkpoints import read_checkpoint
from af_dcd.cli import COMMANDS
from effml_common.cli import main
from effml_common.errors import CheckpointError, InputError, NonFiniteError

METHOD = ("--method", "groups=4", "pool=1")


def refused(capsys, *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main("af-dcd", "af-dcd", COMMANDS, [*(str(w) for w in words), "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "; " in lines[0]
    return lines[0]


def train_words(pair, **changes: object) -> list[object]:
    given = {"student": pair.student, "teacher": pair.teacher, "teacher-checkpoint": pair.weights}
    given |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [w for name, value in given.items() if value for w in (f"--{name}", value)]


def test_a_teacher_without_weights_is_refused(pair, tmp_path, capsys) -> None:
    words = train_words(pair, teacher_checkpoint=None, out=tmp_path / "out")
    assert "no checkpoint; give --teacher-checkpoint" in refused(capsys, "train", *words, *METHOD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint"),
        (b"no zip file", "is refused"),
        ("other", "does not fit its config: it"),
        ("empty", "holds no weights"),
        ("list", "holds a list"),
    ],
)
def test_a_wrong_teacher_checkpoint_is_refused(content, message, pair, tmp_path, capsys) -> None:
    path = tmp_path / "teacher.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "other":
        save_weights(pair.student, path)
    elif content is not None:
        torch.save({"empty": {"state_dict": {}}, "list": [1]}[content], path)
    words = train_words(pair, teacher_checkpoint=path, out=tmp_path / "out")
    assert message in refused(capsys, "train", *words, *METHOD)


def test_two_runs_begun_in_one_second_do_not_share_a_folder(
    pair, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    path = tmp_path / "teacher.pth"
    path.write_bytes(b"no zip file")
    for name in ("first", "second"):
        words = train_words(pair, teacher_checkpoint=path, out=tmp_path / name)
        assert "is refused" in refused(capsys, "train", *words, *METHOD)
        assert not (tmp_path / name).exists()


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


class Sneaky:
    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return (getattr, (HistoryBuffer, "__init__"))


@pytest.mark.parametrize("hostile", [Payload, Sneaky])
def test_a_checkpoint_cannot_run_code(hostile, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": hostile()}, "bad.pth")
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint("bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(hostile()))
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint("raw.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_mmengine_with_its_histories_is_read(tmp_path) -> None:
    import numpy as np
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    for value in (1.0, np.float32(2.0), np.int64(3)):
        history.update(float(value))
    content = {
        "state_dict": {"a": torch.ones(2)}, "meta": {"epoch": 1, "best": np.float64(3.5)},
        "message_hub": {"log_scalars": {"loss": history}},
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    found = read_checkpoint(str(tmp_path / "a.pth"))
    assert torch.equal(found["state_dict"]["a"], torch.ones(2))
    assert found["meta"]["best"] == 3.5


def test_a_teacher_of_nan_stops_the_run_and_is_named(pair, tmp_path, capsys) -> None:
    path = save_weights(pair.teacher, tmp_path / "nan.pth")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["backbone.layer4.0.conv1.weight"].fill_(float("nan"))
    torch.save(content, path)
    words = train_words(pair, teacher_checkpoint=path, out=tmp_path / "out")
    line = refused(capsys, "train", *words, *METHOD, code=3)
    assert "the teacher's features are not finite" in line
    assert "at step 1" in line
    assert "raise tau" in line
    assert not (tmp_path / "out" / "student.pth").exists()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    from af_dcd.adapters.mmseg.optimizer_wrappers import AfDCDOptimWrapper

    weight = torch.nn.Parameter(torch.ones(3))
    wrapper = AfDCDOptimWrapper(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.tensor([1.0, float("inf"), 0.0])
    with pytest.raises(NonFiniteError, match="gradient norm is inf"):
        wrapper.step()
    assert torch.equal(weight, torch.ones(3))


class Clipped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(4, 1, bias=False)
        self.afdcd = torch.nn.Linear(4, 1, bias=False)


@pytest.mark.parametrize("amp", [False, True])
def test_the_clip_reaches_the_branch_alone(amp, monkeypatch) -> None:
    from af_dcd.adapters.mmseg.optimizer_wrappers import AfDCDAmpOptimWrapper, AfDCDOptimWrapper

    model = Clipped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if amp:
        import mmengine.optim.optimizer.amp_optimizer_wrapper as module

        monkeypatch.setattr(module, "is_cuda_available", lambda: True)
        monkeypatch.setattr(
            module, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=8.0)
        )
        wrapper = AfDCDAmpOptimWrapper(optimizer=optimizer, branch_clip={"max_norm": 2.0})
    else:
        wrapper = AfDCDOptimWrapper(optimizer, branch_clip={"max_norm": 2.0})
    wrapper.initialize_count_status(model, 0, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.full((1, 4), 5.0)
    loss = (model.backbone(x) + model.afdcd(x)).sum()
    wrapper.update_params(loss)
    moved = {k: (before[k] - v).norm().item() for k, v in model.state_dict().items()}
    assert moved["backbone.weight"] == pytest.approx(10.0, rel=1e-5)
    assert moved["afdcd.weight"] == pytest.approx(2.0, rel=1e-4)


def test_mixed_precision_without_a_gpu_is_refused(pair, tmp_path, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = train_words(pair, out=tmp_path / "out", amp="bf16")
    assert "amp needs a CUDA device" in refused(capsys, "train", *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no config"),
        ("model = dict(", "cannot be read"),
        ("x = 1", "has no model"),
        (
            "data = dict(train=1)\nmodel = dict(type='EncoderDecoder')",
            "mmseg 0.x; convert it to 1.x",
        ),
        ("model = dict(type='DepthEstimator')", "DepthEstimator is not served"),
        ("model = dict(type='EncoderDecoder')", "no optim_wrapper"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(text, message, pair, tmp_path, capsys) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text + "\n")
    words = train_words(pair, student=path, out=tmp_path / "out")
    assert message in refused(capsys, "train", *words)
    assert not (tmp_path / "out").exists()


def test_a_loop_by_epochs_is_refused_with_what_to_set(pair, tmp_path, capsys) -> None:
    more = ["--cfg-options", "train_cfg.type=EpochBasedTrainLoop"]
    line = refused(capsys, "train", *train_words(pair, out=tmp_path / "out"), *more)
    assert "train_cfg.type=IterBasedTrainLoop" in line


def test_data_that_is_not_there_is_one_line(pair, tmp_path, capsys) -> None:
    more = ["--cfg-options", "train_dataloader.dataset.data_root=nowhere"]
    line = refused(capsys, "train", *train_words(pair, out=tmp_path / "out"), *METHOD, *more)
    assert "nowhere" in line


def test_a_batch_of_one_under_image_pooling_is_explained(pair, tmp_path, capsys) -> None:
    parts = fcn(2)
    parts["head"] = parts["head"].replace("FCNHead", "ASPPHead")
    parts["head"] = parts["head"].replace("num_convs=1, concat_input=False", "dilations=(1, 2)")
    student = write_config(tmp_path / "aspp.py", pair.data, parts)
    words = train_words(pair, student=student, out=tmp_path / "out")
    more = ["--cfg-options", "train_dataloader.batch_size=1"]
    assert "batch size of 2 or more" in refused(capsys, "train", *words, *METHOD, *more)


def test_a_pretrained_backbone_out_of_reach_is_one_line(
    pair, tmp_path, capsys, monkeypatch
) -> None:
    from urllib.error import URLError

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("mmengine.runner.checkpoint.load_url", unreachable)
    more = ["--cfg-options", "model.pretrained=open-mmlab://resnet18_v1c"]
    line = refused(capsys, "train", *train_words(pair, out=tmp_path / "a"), *METHOD, *more)
    assert "cannot be fetched (no network); give --student-init FILE, or --no-pretrained" in line
    words = [*train_words(pair, out=tmp_path / "b", iters=1), *METHOD, *more, "--no-pretrained"]
    assert main("af-dcd", "af-dcd", COMMANDS, ["train", *map(str, words), "--quiet"]) == 0


def test_student_and_teacher_must_be_named(pair, capsys) -> None:
    assert "no student is given; add --student" in refused(capsys, "train")
    line = refused(capsys, "train", "--student", pair.student)
    assert "no teacher is given; add --teacher" in line


def test_classes_of_other_names_are_warned_about(pair, tmp_path, capsys) -> None:
    weights = save_weights(
        pair.teacher, tmp_path / "t.pth", dataset_meta={"classes": ("x", "y", "z")}
    )
    words = train_words(pair, teacher_checkpoint=weights, out=tmp_path / "out", iters=1)
    capsys.readouterr()
    assert main("af-dcd", "af-dcd", COMMANDS, ["train", *map(str, words), *METHOD]) == 0
    assert "classes differ in name or order" in capsys.readouterr().err


def test_the_compiled_operators_say_what_they_need() -> None:
    if importlib.util.find_spec("mmcv") and "mmcv._ext" not in sys.modules:
        pytest.skip("a compiled mmcv is installed")
    from mmcv.ops import sigmoid_focal_loss

    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(
        InputError, match="needs the compiled operators, which mmcv-lite lacks; replace"
    ):
        sigmoid_focal_loss(x, torch.zeros(2).long(), 2.0, 0.25, None, "mean")
    stub = sys.modules["mmcv._ext"]
    assert stub.__spec__ is not None
    with pytest.raises(AttributeError):
        _ = stub.__path__


def test_with_compiled_operators_nothing_is_replaced(monkeypatch) -> None:
    real = object()
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert shims.install_stub() is False
    assert sys.modules["mmcv._ext"] is real


def test_without_mmseg_the_extra_is_named(monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mmseg" else real(name)
    )
    with pytest.raises(
        InputError, match=r'mmsegmentation is not installed; pip install "af-dcd\[mmseg\]"'
    ):
        shims.prepare()


def test_an_environment_that_turns_safe_loading_off_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match="unset it"):
        shims.prepare()


@pytest.mark.slow
def test_inspect_tells_the_papers_pair_without_data(capsys) -> None:
    config = "mmseg::deeplabv3/deeplabv3_{}-d8_4xb2-80k_cityscapes-512x1024.py"
    words = ["--student", config.format("r18"), "--teacher", config.format("r101"), "--json"]
    capsys.readouterr()
    assert main("af-dcd", "af-dcd", COMMANDS, ["inspect", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher map"] == [2048, 64, 128]
    assert told["student map"] == [512, 64, 128]
    # 2 * 9 * 2048^2 * 8192 multiply-accumulates of the generator and 512 * 2048 * 8192 of the alignment.
    expected = (18 * 2048**2 + 512 * 2048) * 8192 / 1e9
    assert told["GMAC a crop: branch forward"] == pytest.approx(expected, abs=0.01)
    # 32 patches of 256 vectors of 128 channels, in float32.
    assert told["bytes of pairwise differences a crop: naive"] == 4 * 32 * 256 * 256 * 128
    assert told["lambda_fd on the mean error"] == pytest.approx(2e-6 * 2048 * 8192, abs=1e-3)
