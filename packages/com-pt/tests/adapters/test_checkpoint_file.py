"""Checkpoint files that users bring: what is safe is loaded, what is not is named."""

import argparse
import fractions
import re

import numpy as np
import pytest
import torch
from com_pt_tiny import clip, clip_chain, spec
from safetensors.torch import save_file

from com_pt.adapters.checkpoint_file import read_weights
from com_pt.adapters.files import load_any
from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from effml_common.errors import InputError

EXTRAS = {
    "numpy scalars": {"best": np.float64(0.5), "epoch": np.int64(3), "loss": np.float32(1)},
    "a numpy array": {"history": np.arange(3.0)},
    "arguments": {"args": argparse.Namespace(lr=1e-3, model="ViT-B-16")},
    "nothing": {},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_training_script_s_checkpoint_is_read(extra, prefix, tmp_path) -> None:
    weights = clip(32).state_dict()
    state = {prefix + name: value for name, value in weights.items()}
    torch.save({"state_dict": state, "epoch": 3, **extra}, tmp_path / "epoch_3.pt")
    read = read_weights(tmp_path / "epoch_3.pt")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_bare_weights_and_safetensors_are_read(tmp_path) -> None:
    weights = clip(32).state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    save_file(
        {f"module.{name}": value for name, value in weights.items()}, tmp_path / "w.safetensors"
    )
    for name in ("bare.pt", "w.safetensors"):
        assert read_weights(tmp_path / name).keys() == weights.keys()


def test_a_compiled_part_is_read(tmp_path) -> None:
    model = clip(32)
    model.visual = torch.compile(model.visual, backend="eager")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert any("_orig_mod" in name for name in model.state_dict())
    assert read_weights(tmp_path / "w.pt").keys() == clip(32).state_dict().keys()


def test_another_class_is_named_with_what_to_do(tmp_path) -> None:
    file = tmp_path / "w.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "half": fractions.Fraction(1, 2)}, file)
    with pytest.raises(
        InputError, match=r"holds fractions\.Fraction, which .*; if you trust it, load"
    ):
        read_weights(file)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04torn"])
def test_what_is_no_checkpoint_is_refused_in_one_line(content, tmp_path) -> None:
    for suffix in (".pt", ".safetensors"):
        file = tmp_path / f"w{suffix}"
        file.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(f"{file} is refused: ")) as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)
        assert "; " in str(caught.value)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "none.pt")
    with pytest.raises(InputError, match="holds no weights by name; give a file with a state_dict"):
        read_weights(tmp_path / "none.pt")


def test_a_chain_starts_from_a_checkpoint_file_as_from_a_folder(pictures, tmp_path) -> None:
    model = clip(32)
    arguments = argparse.Namespace(lr=1.0)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "args": arguments}, tmp_path / "epoch_1.pt")
    document = clip_chain(pictures, 32, 64, epochs=0.5)
    document["stages"][0]["init_from"] = str(tmp_path / "epoch_1.pt")
    members = run_chain(parse_chain(document), tmp_path / "out")
    assert [member.steps for member in members] == [0, 3]
    taken = load_any(str(tmp_path / "out" / "W32")).model.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in model.state_dict().items())


def test_a_file_of_another_model_is_refused(pictures, tmp_path) -> None:
    torch.save(clip(48).state_dict(), tmp_path / "w.pt")
    document = clip_chain(pictures, 32)
    document["stages"][0] |= {"init_from": str(tmp_path / "w.pt"), "model": spec(32)}
    with pytest.raises(InputError, match=r"weights and settings differ: .*size mismatch"):
        run_chain(parse_chain(document), tmp_path / "out")
