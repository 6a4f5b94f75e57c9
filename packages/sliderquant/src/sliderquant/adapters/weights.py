"""Which safetensors files are a model's weights, and under which names they hold them.

A folder may hold more files than its model: shards of an earlier save, weights for other programs. What
counts is what transformers itself would load: the one file ``model.safetensors``, or else the files that
``model.safetensors.index.json`` names. A native folder has its own stem.
"""

import json
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from effml_common.errors import InputError
from effml_common.logging import warn
from sliderquant.adapters.formats import NATIVE_TYPE
from sliderquant.adapters.reasons import input_errors

# Names in the files of other classes than the causal language model, and what it calls them: the
# language part of vision-language models as they are saved today and as they were, and a base model.
RENAMED_PREFIXES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?=(?:embed_tokens|layers|norm)\.)": "model.",
}
# Types of weights in full precision, as safetensors calls them.
FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = "rotary_emb.inv_freq"  # that files of former versions hold, and models compute
_LANGUAGE_PART = re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: Safetensors file.
        name: Its name in that file.
        shape: Its shape.
        nbytes: Its size in the file, in bytes.
        dtype: Its type, as safetensors calls it, such as ``BF16``.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: str


def weight_files(directory: str | Path) -> list[Path]:
    """Return the safetensors files of a model, as transformers chooses them, sorted by name.

    Args:
        directory: Model directory; what else lies in it is left alone.

    Raises:
        InputError: If there is none, or the index is damaged, names a file that is missing, or names
            one outside the directory. Pickled weights are never loaded.
    """
    # One file of the expected name comes first, then the index of several.
    directory = Path(directory)
    first = _main_file(directory)
    if not first.is_file():
        raise InputError(
            f"{directory} holds no safetensors weights named {first.name} or "
            f"{_index_of(first).name}; convert it once with save_pretrained (pickled weights are not "
            "loaded)"
        )
    if first.suffix != ".json":
        return [first]

    # Files that the index names, inside the directory.
    files = []
    for name in sorted(set(_weight_map(first).values())):
        path = directory / name
        if Path(name).name != name or "\\" in name:
            raise InputError(f"{first} names the file {name!r} outside its folder; restore it")
        if not path.is_file():
            raise InputError(f"{first} names {name}, which is missing; copy it again")
        files.append(path)
    return files


def stored_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a model lies, by its name in the files; reads headers only.

    Raises:
        InputError: If a file is damaged, a tensor is not in the file that the index names for it, or
            stands in two of them.
    """
    # Every tensor of the model's files has one place.
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{path} holds {name}, and so does {tensors[name].path.name}; keep one of them"
                )
            tensors[name] = tensor

    # The index and the files agree.
    index = _main_file(Path(directory))
    if index.suffix == ".json":
        for name, file in _weight_map(index).items():
            if name not in tensors or tensors[name].path.name != file:
                raise InputError(f"{index} names {file} for {name}, which is not in it; restore it")
    return tensors


def language_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Return where each tensor lies, by its name in the causal language model.

    Raises:
        InputError: See ``stored_tensors``; or if a weight is stored in a type of quantized models.
    """
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored_tensors(directory).items():
        known = renamed.setdefault(language_name(name), tensor)
        if known is not tensor:
            raise InputError(
                f"{directory} holds both {known.name} and {name}, which are the same weight; "
                "keep one of them"
            )

    # Codes without their scales would be taken for weights: a lost entry of config.json does that.
    for name, tensor in renamed.items():
        if _LANGUAGE_PART.match(name) and tensor.dtype not in FULL_PRECISION:
            raise InputError(
                f"{tensor.path} holds {tensor.name} as {tensor.dtype}, a type of quantized models, and "
                "config.json names no quantization; give weights in float32, float16 or bfloat16"
            )
    return renamed


def language_name(name: str) -> str:
    """Return what the causal language model calls a tensor of a file.

    >>> language_name("language_model.model.norm.weight"), language_name("layers.0.mlp.x.weight")
    ('model.norm.weight', 'model.layers.0.mlp.x.weight')
    """
    for pattern, replacement in RENAMED_PREFIXES.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def tensor_bytes(directory: str | Path) -> dict[str, int]:
    """Return the size of every tensor of a model in bytes, by its name in the files."""
    return {name: tensor.nbytes for name, tensor in stored_tensors(directory).items()}


def _main_file(directory: Path) -> Path:
    """Return the file that decides: the only one, or the index; the only one's name if none exists."""
    config = _plain_config(directory)
    named = config.get("transformers_weights")
    if isinstance(named, str):  # transformers looks for this file first
        if Path(named).name != named:
            raise InputError(
                f"{directory}/config.json: transformers_weights is {named!r}; "
                "name a file inside the folder"
            )
        return directory / named
    stem = "sliderquant" if config.get("model_type") == NATIVE_TYPE else "model"
    first = directory / f"{stem}.safetensors"
    index = _index_of(first)
    return index if index.is_file() and not first.is_file() else first


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _plain_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` as it is; its own reader says what is wrong with it."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index says."""
    with input_errors(f"{index} cannot be read", "restore it"):
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not files or not all(isinstance(file, str) for file in files.values()):
            raise ValueError("its weight_map names no files")
        return files


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return what a file says of each tensor, and see that the file has its whole length."""
    with input_errors(f"{path} is damaged", "copy it again"), path.open("rb") as file:
        # Its length, the header in JSON, then the tensors up to the end.
        (length,) = struct.unpack("<Q", file.read(8))
        available = path.stat().st_size - 8 - length
        if available < 0:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)

        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(
                path=path,
                name=name,
                shape=tuple(entry["shape"]),
                nbytes=end - begin,
                dtype=entry["dtype"],
            )
        needed = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if needed != available:
            raise ValueError(f"{available} bytes of tensors, its header says {needed}")
        return tensors


def refuse_missing(names: Collection[str], directory: Path) -> None:
    """Raise InputError that counts the weights a model lacks, if there are any."""
    if names:
        raise InputError(
            f"{directory} lacks {len(names)} weights, such as {min(names)}; restore its files"
        )


def refuse_shape(
    directory: Path, name: str, stored: Sequence[int], expected: Sequence[int]
) -> NoReturn:
    """Raise InputError that names a weight whose shape is not that of the config."""
    raise InputError(
        f"{directory} cannot be loaded ({name} has shape {list(stored)}, its config asks for "
        f"{list(expected)}); restore its files"
    )


def warn_of_unused(names: Collection[str], directory: Path) -> None:
    """Warn that a folder holds weights of which its config knows nothing, as transformers does.

    Args:
        names: Of the tensors, in the language model; what else the folder holds is left alone.
        directory: For the message.
    """
    unused = [n for n in names if _LANGUAGE_PART.match(n) and not n.endswith(_OLD_BUFFERS)]
    if unused:
        warn(
            f"{directory} holds {len(unused)} weights that its config.json has no place for, such as "
            f"{min(unused)}; they are left out, so check that the two belong together"
        )
