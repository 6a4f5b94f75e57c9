"""Images from where timm reads them, several processes and kills, through the command line."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from scalekd_runs import STUDENT, WORDS, make_photos, metrics_of, scalekd

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


def top1(out: Path) -> float:
    report = json.loads((out / "run" / "report.json").read_text())
    return report["rows"][0]["metrics"]["top1"]["mean"]


def test_a_hugging_face_data_set_trains_as_the_folder_it_was_made_of(photos, tmp_path) -> None:
    pytest.importorskip("datasets")
    words = [*WORDS, "--epochs", "8", "--lr", "5e-3", "--kd-alpha", "0", "--w-full", "0.1"]
    words += ["--w-ac", "0", "--recipe", "adv-vit", "--ema", "0", "--min-crop", "0.9"]
    source = ["--dataset", f"hfds/{photos}", "--data-dir", tmp_path / "cache"]
    source += ["--val-split", "validation"]
    assert scalekd("train", *source, *words, "--out", tmp_path / "hf") == 0
    assert len(metrics_of(tmp_path / "hf")) == 8 * (36 // 8)
    assert top1(tmp_path / "hf") > 60  # three colours, chance is 33


# webdataset leaves its tar files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_of_webdataset_train(photos, tmp_path) -> None:
    pytest.importorskip("webdataset")
    shards, splits = tmp_path / "shards", {}
    shards.mkdir()
    for split, name in (("train", "train"), ("val", "val")):
        files = sorted((photos / split).glob("*/*.png"))
        shard = f"{name}-0000.tar"
        with tarfile.open(shards / shard, "w") as tar:
            for i, file in enumerate(files):
                label = str(("ant", "bee", "cat").index(file.parent.name)).encode()
                for suffix, data in (("png", file.read_bytes()), ("cls", label)):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        splits[split] = {"name": split, "num_samples": len(files), "filenames": [shard],
                         "shard_lengths": [len(files)]}  # fmt: skip
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    words = ["--dataset", "wds/photos", "--data-dir", shards, *WORDS, "--out", tmp_path / "run"]
    assert scalekd("train", *words) == 0
    gc.collect()
    assert metrics_of(tmp_path / "run")[-1]["step"] >= 8


@pytest.mark.slow
def test_torchrun_trains_one_student_in_two_processes(photos, tmp_path) -> None:
    out = tmp_path / "run"
    words = ["train", "--data-dir", photos, *WORDS, "--out", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "scalekd", *map(str, words)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes share the batch of 8: as many updates as one process does.
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 9))
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, checkpoint_path=str(out / "student.safetensors"),
        **STUDENT,
    )  # fmt: skip
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(photos, tmp_path) -> None:
    words = ["train", "--data-dir", photos, *WORDS, "--epochs", "5", "--save-every", "2"]
    assert scalekd(*words, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "scalekd", *map(str, words), "--out", str(out)]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (out / "run" / "checkpoints" / "step-4").exists():
        assert process.poll() is None, "it ended before the kill"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "student.safetensors").exists()
    assert scalekd(*words, "--out", out, "--resume", "auto") == 0
    whole, killed = (
        load_file(tmp_path / run / "student.safetensors") for run in ("whole", "killed")
    )
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert metrics_of(tmp_path / "whole") == metrics_of(out)
