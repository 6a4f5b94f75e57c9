"""Checkpoints under kill -9, damage, hostile pickles and failing disks."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from effml_common import checkpoint
from effml_common.errors import CheckpointError

FILES = ("model.safetensors", "trainer.pt", "config.json", "manifest.json")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint.save(
        tmp_path / "ck", 7, tensors(), {"lr": 0.1, "t": torch.arange(3)}, config={"bits": 4}
    )


def test_everything_comes_back(saved) -> None:
    found = checkpoint.load(saved)
    assert (found.step, found.config, found.state["lr"]) == (7, {"bits": 4}, 0.1)
    assert torch.equal(found.tensors["w"], tensors()["w"])
    assert torch.equal(found.state["t"], torch.arange(3))


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_during_save_loses_nothing(kills, tmp_path) -> None:
    script = Path(__file__).with_name("kill_server.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts.pop("staging") > 0, "no kill hit a save: the test would prove nothing"
    expected = {"good": kills, "unloadable": 0, "missing": 0, "wrong": 0, "staging left": 0}
    assert counts == expected


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 64))


@pytest.mark.parametrize(("damage", "trials"), [(flip_bit, 1000), (truncate, 1000), (append, 500)])
@pytest.mark.parametrize("name", FILES)
def test_all_damage_is_detected(saved, damage, trials, name) -> None:
    draw = random.Random(name)
    intact = (saved / name).read_bytes()
    for _ in range(trials):
        (saved / name).write_bytes(damage(intact, draw))
        with pytest.raises(CheckpointError):
            checkpoint.load(saved)
    (saved / name).write_bytes(intact)
    checkpoint.load(saved)


class Payload:
    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_states(marker: Path) -> list[bytes]:
    touch = f"open({str(marker)!r}, 'w').close()"
    payloads = [
        Payload(os.system, f"touch {marker}"),
        Payload(eval, touch),
        Payload(exec, touch),
        Payload(subprocess.check_call, ["touch", str(marker)]),
        Payload(os.mkdir, str(marker)),
        Payload(shutil.copy, __file__, str(marker)),
        Payload(getattr, Payload(__import__, "os"), "system"),
        Payload(Path.touch, marker),
    ]
    raw = [pickle.dumps({"state": payload}) for payload in payloads]
    for number, payload in enumerate(payloads[:2]):
        path = marker.with_name(f"zip-{number}")
        torch.save({"state": payload}, path)
        raw.append(path.read_bytes())
    return raw


@pytest.mark.parametrize("number", range(10))
def test_hostile_pickles_are_refused_unexecuted(saved, tmp_path, number) -> None:
    marker = tmp_path / "executed"
    (saved / "trainer.pt").write_bytes(hostile_states(marker)[number])
    # A consistent manifest: the attacker can hash too, so the unpickler itself must refuse.
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["trainer.pt"] = checkpoint._fingerprint(saved / "trainer.pt")
    manifest.pop("sha256")
    (saved / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))
    checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match="is refused") as caught:
        checkpoint.load(saved)
    assert not marker.exists()
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk_leaves_the_previous_checkpoint(small_disk) -> None:
    root = small_disk / "ck"
    checkpoint.save(root, 1, tensors(), {})
    outcomes = set()
    # Each size leaves the disk full at another moment of the save, down to the last file.
    for filler in range(0, 252, 4):
        with (
            contextlib.suppress(OSError),
            open(small_disk / "filler", "wb", buffering=0) as file,
        ):
            file.write(b"x" * filler * 1024)
        message = ""
        try:
            checkpoint.save(root, 2, tensors(1), {"big": torch.zeros(4096)}, keep=9)
        except CheckpointError as error:
            message = str(error)
        assert re.fullmatch(r"cannot save step 2[^\n]+; [^\n]+|", message)
        assert checkpoint.latest(root).step == (1 if message else 2)
        assert not list(root.glob(".tmp-*"))
        shutil.rmtree(root / "step-2", ignore_errors=True)
        outcomes.add("refused" if message else "saved")
    assert outcomes == {"saved", "refused"}


def test_read_only_disk_leaves_the_previous_checkpoint(small_disk) -> None:
    root = small_disk / "ck"
    checkpoint.save(root, 1, tensors(), {})
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True).returncode:
        pytest.skip("a mount cannot be made read-only here")
    with pytest.raises(CheckpointError, match="cannot save step 2"):
        checkpoint.save(root, 2, tensors(1), {})
    assert checkpoint.latest(root).step == 1


def test_vanished_folder_is_an_error_not_a_new_folder(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save(run / "ck", 1, tensors(), {})
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot save step 2"):
        checkpoint.save(run / "ck", 2, tensors(), {})
    assert not run.exists()
    assert checkpoint.latest(tmp_path / "elsewhere" / "ck").step == 1


def test_a_step_is_never_overwritten(saved) -> None:
    with pytest.raises(CheckpointError):
        checkpoint.save(saved.parent, 7, tensors(1), {})
    assert torch.equal(checkpoint.load(saved).tensors["w"], tensors()["w"])


def test_latest_walks_back_past_damage_and_says_so(tmp_path, capsys) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=3)
    with (tmp_path / "step-3" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (tmp_path / "step-2" / "trainer.pt").unlink()
    assert checkpoint.latest(tmp_path).step == 1
    said = capsys.readouterr().err
    assert "step-3" in said
    assert "step-2" in said


def test_prune_keeps_the_newest_good_ones(tmp_path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-4", "step-5"]


def test_prune_does_not_count_a_damaged_checkpoint_as_kept(tmp_path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=2)
    (tmp_path / "step-2" / "config.json").write_text("{ }")
    checkpoint.save(tmp_path, 3, tensors(3), {}, keep=2)
    shutil.rmtree(tmp_path / "step-3")
    assert checkpoint.latest(tmp_path).step == 1


def test_only_dead_staging_folders_are_swept(tmp_path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = tmp_path / f".tmp-3-{child.pid}", tmp_path / ".tmp-3-1"
    dead.mkdir()
    alive.mkdir()
    checkpoint.sweep(tmp_path)
    assert not dead.exists()
    assert alive.exists()


def test_state_that_would_not_load_again_is_refused_at_save(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="would not load again"):
        checkpoint.save(tmp_path / "ck", 1, tensors(), {"object": Payload(print)})
    assert checkpoint.latest(tmp_path / "ck") is None


def test_tied_and_strided_tensors_come_back(tmp_path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    saved = checkpoint.save(tmp_path, 1, {"a": whole, "b": whole, "c": whole.T, "d": whole[1]}, {})
    found = checkpoint.load(saved).tensors
    for name, value in {"a": whole, "b": whole, "c": whole.T, "d": whole[1]}.items():
        assert torch.equal(found[name], value)


def test_files_follow_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        saved = checkpoint.save(tmp_path / "ck", 1, tensors(), {})
    finally:
        os.umask(before)
    for name in FILES:
        assert stat.S_IMODE((saved / name).stat().st_mode) == 0o640


def test_other_ranks_do_not_write(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    checkpoint.save(tmp_path / "ck", 1, tensors(), {})
    assert not (tmp_path / "ck").exists()


def test_nothing_saved_is_none(tmp_path) -> None:
    with contextlib.chdir(tmp_path):
        assert checkpoint.latest("nowhere") is None


def test_a_folder_that_vanishes_during_the_save_is_one_line(tmp_path, monkeypatch) -> None:
    checkpoint.save(tmp_path / "ck", 1, tensors(), {})
    fingerprint = checkpoint._fingerprint

    def vanish(path: Path) -> dict:
        shutil.rmtree(path.parent)
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", vanish)
    with pytest.raises(CheckpointError, match="cannot save step 2") as caught:
        checkpoint.save(tmp_path / "ck", 2, tensors(1), {})
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert checkpoint.latest(tmp_path / "ck").step == 1


def test_a_damaged_step_is_put_aside_when_a_resumed_run_reaches_it(tmp_path, capsys) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {})
    (tmp_path / "step-2" / "trainer.pt").write_bytes(b"")
    assert checkpoint.latest(tmp_path).step == 1
    checkpoint.save(tmp_path, 2, tensors(5), {})
    assert torch.equal(checkpoint.latest(tmp_path).tensors["w"], tensors(5)["w"])
    assert (tmp_path / "step-2.damaged").is_dir()
    assert "step-2.damaged" in capsys.readouterr().err


def test_a_renamed_checkpoint_is_not_taken_for_another_step(saved) -> None:
    saved.rename(saved.with_name("step-9"))
    with pytest.raises(CheckpointError):
        checkpoint.load(saved.with_name("step-9"))


def test_an_older_step_saved_late_does_not_prune_itself_or_newer_ones(tmp_path) -> None:
    for step in (1, 10, 20, 15):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-10", "step-15", "step-20"]


def test_the_manifest_holds_the_sha256_of_every_other_file(saved) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    for name, told in manifest["files"].items():
        data = (saved / name).read_bytes()
        assert told == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert (manifest["format"], manifest["step"]) == (1, 7)
    assert set(manifest["libraries"]) == {"torch", "safetensors"}


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer.pt", ""])
def test_a_missing_file_or_folder_is_named(saved, name) -> None:
    if name:
        (saved / name).unlink()
    else:
        shutil.rmtree(saved)
    with pytest.raises(CheckpointError, match=name or "manifest.json"):
        checkpoint.load(saved)


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_impossible_numbers_are_refused(tmp_path, step, keep) -> None:
    with pytest.raises(CheckpointError, match="give keep >= 1 and step >= 0"):
        checkpoint.save(tmp_path / "ck", step, tensors(), {}, keep=keep)
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("value", [lambda: None, Path("x"), Fraction(1, 2), [Payload(print)]])
def test_only_plain_state_is_kept(tmp_path, value) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path / "ck", 1, tensors(), {"value": value})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "ck") == []


def test_states_of_the_usual_schedulers_are_plain(tmp_path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer.step()
    rates = torch.optim.lr_scheduler
    schedulers = [
        rates.MultiStepLR(optimizer, [3, 5]),
        rates.OneCycleLR(optimizer, 0.2, total_steps=9),
        rates.ReduceLROnPlateau(optimizer),
        rates.LambdaLR(optimizer, lambda step: 1.0),
    ]
    states = [scheduler.state_dict() for scheduler in schedulers]
    saved = checkpoint.save(tmp_path / "ck", 1, {}, {"states": states})
    assert checkpoint.load(saved).state["states"] == states


def test_a_small_view_does_not_drag_its_whole_storage_along(tmp_path) -> None:
    saved = checkpoint.save(tmp_path / "ck", 1, {"w": torch.zeros(100_000)[:4]}, {})
    assert (saved / "model.safetensors").stat().st_size < 1000
