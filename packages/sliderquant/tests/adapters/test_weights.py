"""Which files are a model's weights: what transformers loads, whatever else lies in the folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from effml_common.errors import InputError
from sliderquant.adapters.model_folder import open_model
from sliderquant.adapters.reasons import input_errors
from sliderquant.adapters.weights import stored_tensors, tensor_bytes, weight_files

INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def sharded(save) -> Path:
    """A tiny Llama in two shards, beside the shards of another save with other values."""
    directory = save("llama")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        save_file(
            {n: tensors[n] + 1 for n in part},
            directory / f"model-{number}-of-old.safetensors",
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def edit_index(directory: Path, **files: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update({name.replace("__", "."): file for name, file in files.items()})
    (directory / INDEX).write_text(json.dumps(index))


def test_only_files_of_the_index_are_read(sharded) -> None:
    model = AutoModelForCausalLM.from_pretrained(sharded)
    assert [path.name for path in weight_files(sharded)] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    opened = open_model(sharded)
    opened.source.check_finite()
    for name, weight in model.model.layers[1].named_parameters():
        assert torch.equal(opened.source.block(1)[name], weight), name
    assert tensor_bytes(sharded) == {n: p.nbytes for n, p in model.named_parameters()}


def test_a_single_file_comes_before_an_index_as_in_transformers(sharded) -> None:
    tensors = {
        n: p * 2 for n, p in AutoModelForCausalLM.from_pretrained(sharded).state_dict().items()
    }
    save_file(tensors, sharded / "model.safetensors", metadata={"format": "pt"})
    assert [path.name for path in weight_files(sharded)] == ["model.safetensors"]
    theirs = AutoModelForCausalLM.from_pretrained(sharded).model.layers[1].mlp.up_proj.weight
    assert torch.equal(theirs, tensors[NAME])


def move_to_other_shard(directory: Path) -> None:
    other = {"model-0.safetensors": "model-1.safetensors"}
    file = json.loads((directory / INDEX).read_text())["weight_map"][NAME]
    edit_index(directory, **{NAME: other.get(file, "model-0.safetensors")})


def repeat_tensor(directory: Path) -> None:
    first, second = (load_file(directory / f"model-{i}.safetensors") for i in range(2))
    name = next(iter(first))
    save_file(second | {name: first[name]}, directory / "model-1.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "model-1.safetensors").unlink(),
            "names model-1.safetensors, which is missing",
        ),
        (
            lambda d: edit_index(d, odd="../else.safetensors"),
            r"'\.\./else\.safetensors' outside its",
        ),
        (lambda d: edit_index(d, odd="/etc/passwd"), "'/etc/passwd' outside its folder"),
        (lambda d: edit_index(d, odd="model-0.safetensors"), "for odd, which is not in it"),
        (move_to_other_shard, f"for {NAME}, which is not in it"),
        (repeat_tensor, "and so does model-0.safetensors"),
        (lambda d: (d / INDEX).write_text("{"), "cannot be read"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "names no files"),
        (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), "cannot be read"),
        (lambda d: (d / INDEX).unlink(), "no safetensors weights named model.safetensors"),
        (lambda d: (d / "model-1.safetensors").write_bytes(b"\x01"), "is damaged"),
    ],
)
def test_an_index_that_does_not_fit_is_one_line(sharded, damage, message) -> None:
    damage(sharded)
    with pytest.raises(InputError, match=message) as caught:
        stored_tensors(sharded)
    assert "; " in str(caught.value)


def test_any_error_of_a_library_is_one_line_and_ours_pass() -> None:
    class OddError(Exception):
        pass

    with pytest.raises(InputError) as caught, input_errors("x cannot be read", "restore it"):
        raise OddError("several lines:\n  the cause\n")
    assert str(caught.value) == "x cannot be read (several lines: the cause); restore it"
    with pytest.raises(InputError, match=r"\(OddError\)"), input_errors("x", "y"):
        raise OddError
    for error in (InputError("own; do"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as passed, input_errors("x", "y"):
            raise error
        assert passed.value is error
