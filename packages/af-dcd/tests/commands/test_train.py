"""Training a mmsegmentation pair through mmengine's Runner, by the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")

from af_dcd.cli import COMMANDS
from effml_common.cli import main

METHOD = ["--method", "groups=4", "pool=1"]


def run(*words: object, code: int = 0) -> None:
    assert main("af-dcd", "af-dcd", COMMANDS, [str(w) for w in words]) == code


def train(pair, out: Path, *words: object, code: int = 0) -> Path:
    run(
        "train",
        *pair.words(),
        *METHOD,
        "--out",
        out,
        "--save-every",
        3,
        "--quiet",
        *words,
        code=code,
    )
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory) -> Path:
    from yapf.yapflib.yapf_api import FormatCode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", FormatCode)
        return train(pair, tmp_path_factory.mktemp("trained") / "run")


def test_one_command_distils_and_writes_student_config_and_report(trained, pair) -> None:
    lines = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "decode.loss_ce", "loss_kd", "loss_fd", "loss_ctr"} <= set(lines[0])
    terms = [lines[0][k] for k in ("decode.loss_ce", "loss_kd", "loss_fd", "loss_ctr")]
    assert lines[0]["loss"] == pytest.approx(sum(terms), rel=1e-5)
    report = json.loads((trained / "run/report.json").read_text())
    assert report["rows"][0]["metrics"]["mIoU"]["n"] == 1
    assert not any(k.startswith(("afdcd", "teacher")) for k in weights(trained / "student.pth"))
    assert "AfDCD" not in (trained / "student.py").read_text()


def test_training_moves_the_student_and_the_branch_and_leaves_the_teacher(
    pair, trained, tmp_path
) -> None:
    from af_dcd.adapters.mmseg.checkpoints import read_checkpoint

    early = torch.load(pair.weights, weights_only=True)["state_dict"]
    again = read_checkpoint(str(pair.weights))["state_dict"]
    assert same(early, again)
    from effml_common import checkpoint

    steps = [checkpoint.load(trained / f"run/checkpoints/step-{n}").tensors for n in (3, 6)]
    for part in ("backbone", "decode_head", "afdcd"):
        names = [k for k in steps[0] if f"/{part}." in k and k.endswith("weight")]
        assert names
        assert any(not torch.equal(steps[0][k], steps[1][k]) for k in names)
    assert not any("teacher" in k for k in steps[0])


PLAIN = """
import sys, types
from importlib.machinery import ModuleSpec

class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *a, **k: None

stub = Stub("mmcv._ext"); stub.__spec__ = ModuleSpec("mmcv._ext", None)
sys.modules["mmcv._ext"] = stub
import numpy as np, torch
torch.set_num_threads(1)
from mmseg.apis import inference_model, init_model
model = init_model(sys.argv[1], sys.argv[2], device="cpu")
image = (np.arange(40 * 40 * 3) % 251).reshape(40, 40, 3).astype("uint8")
found = inference_model(model, image).seg_logits.data
assert not any(name.startswith(("af_dcd", "effml")) for name in sys.modules)
assert list(model.dataset_meta["classes"]) == ["a", "b", "c"], model.dataset_meta
torch.save(found, sys.argv[3])
"""


@pytest.mark.slow
def test_plain_mmseg_loads_the_student_without_us(trained, tmp_path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", PLAIN, "student.py", "student.pth"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(tmp_path / "logits.pt")], cwd=trained, env=environment, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unexpected key" not in done.stdout + done.stderr
    assert "missing keys" not in done.stdout + done.stderr
    import numpy as np

    from af_dcd.adapters.mmseg.checkpoints import load_weights
    from af_dcd.adapters.mmseg.config_files import read_config
    from af_dcd.adapters.mmseg.shims import build_model

    model = build_model(read_config(str(trained / "student.py")).model).eval()
    load_weights(model, str(trained / "student.pth"))
    image = (np.arange(40 * 40 * 3) % 251).reshape(40, 40, 3).astype("uint8")
    with torch.no_grad():
        data = {"inputs": [torch.from_numpy(image).permute(2, 0, 1)]}
        ours = model.test_step(data)[0].seg_logits.data
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours)


@pytest.mark.parametrize("ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_that_lost_its_end_resumes_to_the_same_bits(ema, pair, tmp_path) -> None:
    hooks = "custom_hooks=[{'type': 'EMAHook', 'momentum': 0.3}]"
    more = ["--cfg-options", hooks] if ema else []
    whole = train(pair, tmp_path / "whole", *more)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "run/checkpoints/step-6")
    (cut / "student.pth").unlink()
    train(pair, cut, *more, "--resume", "auto")
    assert same(weights(whole / "student.pth"), weights(cut / "student.pth"))
    metrics = [(folder / "run/metrics.jsonl").read_text() for folder in (whole, cut)]
    assert metrics[0] == metrics[1]
    if ema:  # what is exported is the average, not the last iterate
        from effml_common import checkpoint

        saved = checkpoint.load(whole / "run/checkpoints/step-6").tensors
        name = "decode_head.conv_seg.weight"
        ours = weights(whole / "student.pth")[name]
        assert torch.equal(ours, saved[f"state_dict/{name}"])
        assert not torch.equal(ours, saved[f"ema_state_dict/module.{name}"])


def test_a_signal_stops_after_a_save_and_the_run_goes_on_to_the_same_bits(
    pair, trained, tmp_path, monkeypatch
) -> None:
    from af_dcd.adapters.mmseg.training_loop import AfDCDTrainLoop

    original = AfDCDTrainLoop.run_iter

    def interrupted(self, batch) -> None:
        original(self, batch)
        if self._iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(AfDCDTrainLoop, "run_iter", interrupted)
        out = train(pair, tmp_path / "run", code=143)
    assert not (out / "student.pth").exists()
    train(pair, out, "--resume", "auto")
    assert same(weights(trained / "student.pth"), weights(out / "student.pth"))


def test_resuming_with_other_settings_is_refused(pair, trained, capsys) -> None:
    train(pair, trained, "--resume", "auto", "--lambda-ctr", 1.0, code=2)
    assert "lambda_ctr none, not 1.0" in capsys.readouterr().err.replace("None", "none")


def test_a_folder_with_a_run_is_not_overwritten(pair, trained, capsys) -> None:
    before = (trained / "student.pth").read_bytes()
    train(pair, trained, code=2)
    assert "of an earlier run" in capsys.readouterr().err
    assert (trained / "student.pth").read_bytes() == before


def test_without_weights_for_mimicking_and_contrast_there_is_no_branch(pair, tmp_path) -> None:
    out = train(pair, tmp_path / "run", "--lambda-fd", 0, "--lambda-ctr", 0)
    from effml_common import checkpoint

    tensors = checkpoint.load(out / "run/checkpoints/step-6").tensors
    assert not any("afdcd" in name for name in tensors)
    assert "loss_ctr" not in (out / "run/metrics.jsonl").read_text()


def test_an_unfinished_run_exports_its_student(pair, trained, tmp_path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    (cut / "student.pth").unlink()
    run("export", cut, tmp_path / "mine.pth")
    assert same(weights(tmp_path / "mine.pth"), weights(trained / "student.pth"))
    found = torch.load(tmp_path / "mine.pth", weights_only=True)
    assert list(found["meta"]["dataset_meta"]["classes"]) == ["a", "b", "c"]
    assert (tmp_path / "mine.py").is_file()


def test_eval_repeats_the_figure_of_the_run(pair, trained, tmp_path, capsys) -> None:
    capsys.readouterr()
    words = [trained / "student.py", trained / "student.pth", "--out", tmp_path / "eval", "--json"]
    run("eval", *words)
    told = json.loads(capsys.readouterr().out)["rows"][0]["metrics"]["mIoU"]["mean"]
    report = json.loads((trained / "run/report.json").read_text())
    assert told == report["rows"][0]["metrics"]["mIoU"]["mean"]


def test_a_student_starts_from_given_weights(pair, tmp_path) -> None:
    from dcd_tiny import save_weights

    first = save_weights(pair.student, tmp_path / "first.pth", seed=5)
    still = ["optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0"]
    out = train(pair, tmp_path / "run", "--student-init", first, "--cfg-options", *still)
    before, after = weights(first), weights(out / "student.pth")
    trainable = [k for k in before if "running" not in k and "tracked" not in k]
    assert all(torch.equal(before[k], after[k]) for k in trainable)


def test_a_dry_run_tells_every_weighted_term_and_writes_nothing(pair, tmp_path, capsys) -> None:
    capsys.readouterr()
    words = [*pair.words(), *METHOD, "--dry-run", "--out", tmp_path / "run", "--json"]
    run("train", *words)
    rows = {row["name"]: row["metrics"] for row in json.loads(capsys.readouterr().out)["rows"]}
    terms = {"loss_kd", "loss_fd", "loss_ctr", "decode.loss_ce"}
    assert terms <= set(rows)
    losses = [name for name in rows if "loss_" in name]
    total = sum(rows[name]["value"]["mean"] for name in losses)
    assert rows["loss"]["value"]["mean"] == pytest.approx(total, rel=1e-5)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_on_gloo_train_what_one_does(pair, tmp_path) -> None:
    """Without dropout, random masks, augmentation and batch statistics, which differ by design."""
    from dcd_tiny import SIDE, write_images

    data = write_images(tmp_path / "data", count=8, side=SIDE)
    still = (
        "[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}]"
    )
    options = [
        f"train_dataloader.dataset.pipeline={still}", f"train_dataloader.dataset.data_root={data}",
        "model.decode_head.dropout_ratio=0.0", "model.backbone.norm_eval=True",
        "model.decode_head.norm_cfg=None", "val_cfg=None", "val_dataloader=None",
        "val_evaluator=None",
    ]  # fmt: skip
    common = ["train", *pair.words(), *METHOD, "mask=center", "--iters", "3", "--quiet"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    run(*common, "--out", alone, "--cfg-options", *options, "train_dataloader.batch_size=4")
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    words += ["--master-port=29613", "-m", "af_dcd", *common, "--launcher", "pytorch"]
    words += ["--out", str(both), "--cfg-options", *options, "train_dataloader.batch_size=2"]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(alone / "student.pth"), weights(both / "student.pth")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
