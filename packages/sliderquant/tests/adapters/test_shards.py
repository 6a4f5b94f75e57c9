"""The shard writer: whole files or none, and the next process goes on."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from effml_common.errors import InputError
from sliderquant.adapters import shards
from sliderquant.adapters.shards import STAGING, ShardWriter, join_files
from sliderquant.adapters.weights import tensor_bytes


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Sizes and types for which a careless join would misalign what follows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{seed}.odd": torch.randn(3, generator=generator).to(torch.bfloat16),
        f"{seed}.bytes": torch.arange(5, dtype=torch.uint8),
        f"{seed}.words": torch.randint(9, (7, 3), generator=generator, dtype=torch.int32),
        f"{seed}.shape": torch.tensor([7, 3]),
        f"{seed}.half": torch.randn(5, 3, generator=generator).half(),
    }


EXPECTED = {name: tensor for seed in range(4) for name, tensor in tensors(seed).items()}


def load_all(folder) -> dict[str, torch.Tensor]:
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_joined_files_hold_the_same_tensors_aligned(tmp_path) -> None:
    for seed in range(3):
        save_file(tensors(seed), tmp_path / f"{seed}.in")
    join_files([tmp_path / f"{seed}.in" for seed in range(3)], tmp_path / "model.safetensors")
    expected = tensors(0) | tensors(1) | tensors(2)
    assert_same(load_file(tmp_path / "model.safetensors"), expected)
    with (tmp_path / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert length % 8 == 0
    for name, tensor in expected.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    assert tensor_bytes(tmp_path) == {name: t.nbytes for name, t in expected.items()}


def test_small_pieces_become_one_file_and_large_ones_bounded_shards(tmp_path) -> None:
    for limit, files in ((10**6, 1), (300, 2)):
        writer = ShardWriter(tmp_path / str(limit), "model", {}, limit)
        for seed in range(4):
            writer.add(tensors(seed), {str(seed): None})
        names = writer.join()
        writer.finish()
        shards = sorted((tmp_path / str(limit)).glob("*.safetensors"))
        assert len(shards) == files
        assert_same(load_all(tmp_path / str(limit)), EXPECTED)
        assert all(sum(t.nbytes for t in load_file(s).values()) <= limit for s in shards)
        if files > 1:
            index = json.loads((tmp_path / "300" / "model.safetensors.index.json").read_text())
            assert names[-1] == "model.safetensors.index.json"
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in EXPECTED.values())
            for name, shard in index["weight_map"].items():
                assert name in load_file(tmp_path / "300" / shard)
        assert sorted(path.name for path in (tmp_path / str(limit)).iterdir()) == sorted(names)


def test_a_block_larger_than_a_shard_is_divided(tmp_path) -> None:
    writer = ShardWriter(tmp_path, "model", {}, 60)
    writer.add(tensors(0), {})
    assert len(writer.join()) > 2
    assert_same(load_all(tmp_path), tensors(0))


# One process forks the writers, so that torch is imported once.
KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_shards import EXPECTED, assert_same, load_all, tensors
from sliderquant.adapters import shards

out, count = Path(sys.argv[1]), 0
sync = shards.fsync_path

def run(kill_at):
    def counted(path):
        global count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    shards.fsync_path = counted
    writer = shards.ShardWriter(out, "model", {"run": 1}, 300)
    for seed in range(4):
        if str(seed) not in writer.notes:
            writer.add(tensors(seed), {str(seed): None})
    writer.join()
    writer.finish()

for kill_at in (2, 3, 3, 5, 4, 99):
    child = os.fork()
    if child == 0:
        run(kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (kill_at < 99), (kill_at, status)
    found = load_all(out)  # whatever is visible is whole
    assert_same(found, {name: EXPECTED[name] for name in found})
assert_same(load_all(out), EXPECTED)
assert not (out / shards.STAGING).exists()
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_and_is_continued(tmp_path) -> None:
    """One chain of kills at many places, as one run that never gets a quiet minute."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_unfinished_export_of_something_else_is_not_continued(tmp_path) -> None:
    ShardWriter(tmp_path, "model", {"run": 1}).add(tensors(0), {"0": {"bits": 2}})
    assert ShardWriter(tmp_path, "model", {"run": 1}).notes == {"0": {"bits": 2}}
    with pytest.raises(InputError, match="unfinished export of another model"):
        ShardWriter(tmp_path, "model", {"run": 2})
    for content in ("{", "7", "[]", '{"pieces": []}'):
        (tmp_path / STAGING / "journal.json").write_text(content)
        with pytest.raises(InputError, match="damaged"):
            ShardWriter(tmp_path, "model", {"run": 1})


def test_a_folder_with_a_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a model already"):
        ShardWriter(tmp_path, "model", {})
    with pytest.raises(InputError, match="is a file"):
        ShardWriter(tmp_path / "config.json", "model", {})


def test_a_full_disk_leaves_the_earlier_pieces(tmp_path, monkeypatch) -> None:
    writer = ShardWriter(tmp_path, "model", {})
    writer.add(tensors(0), {"0": None})

    def full(*_, **__):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sliderquant.adapters.shards.save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        writer.add(tensors(1), {"1": None})
    assert caught.value.errno == 28
    monkeypatch.undo()
    again = ShardWriter(tmp_path, "model", {})
    assert again.notes == {"0": None}
    assert again.names == tensors(0).keys()
    again.add(tensors(1), {"1": None})
    again.join()
    assert_same(load_all(tmp_path), tensors(0) | tensors(1))


def test_a_disk_without_room_is_an_error_that_names_the_joined_file(tmp_path, monkeypatch) -> None:
    save_file(tensors(0), tmp_path / "0.in")

    def full(*_args) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(shards, "_copy", full)
    with pytest.raises(OSError, match="no space") as caught:
        join_files([tmp_path / "0.in"], tmp_path / "model.safetensors")
    assert caught.value.filename == str(tmp_path / "model.safetensors")
