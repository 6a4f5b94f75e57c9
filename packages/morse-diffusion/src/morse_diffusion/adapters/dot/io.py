"""A Dot on disk: ``config.json``, its extra blocks, and the low-rank residuals in PEFT's layout."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from effml_common.files import atomic_write
from effml_common.logging import warn
from morse_diffusion.errors import DotMismatchError
from morse_diffusion.method.lora import path_without_adapters

FORMAT = 1
BLOCKS_FILE, RESIDUALS_FILE = "dot_blocks.safetensors", "adapter_model.safetensors"
SAMPLED_SIGNS = 64  # of each weight, in a fingerprint


def fingerprint(dash: nn.Module) -> str:
    """Identify a Dash by its class, the names and shapes of its weights, and a sample of their signs.

    Signs, because a Dash loaded in half precision is the same Dash. A LoRA in PEFT's form beside the
    weights does not count; one that was fused into them does.

    Args:
        dash: Any network; its weights are read on the device that they are on.

    Returns:
        16 hexadecimal digits.
    """
    sha = hashlib.sha256(type(dash).__name__.encode())
    named = ((path_without_adapters(name), weight) for name, weight in dash.named_parameters())
    for name, weight in sorted((n, w) for n, w in named if n is not None):
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED_SIGNS)][:SAMPLED_SIGNS]
        # bfloat16 has the range of float32, so no sign is lost; float16 flushes below 6e-8.
        signs = (sample.float() > 1e-6).cpu().tolist()
        sha.update(f"{name} {tuple(weight.shape)} {signs}".encode())
    return sha.hexdigest()[:16]


def write_dot(
    folder: Path,
    config: Mapping[str, Any],
    adapter: Mapping[str, Any],
    blocks: Mapping[str, Tensor],
    residuals: Mapping[str, Tensor],
) -> None:
    """Write the four files of a Dot.

    Args:
        folder: Created if missing.
        config: For ``config.json``; the format's number is added.
        adapter: For ``adapter_config.json``, in PEFT's words.
        blocks: Weights of the extra blocks, by their name in the Dot.
        residuals: Low-rank residuals under the names that PEFT gives them.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in ((BLOCKS_FILE, blocks), (RESIDUALS_FILE, residuals)):
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        atomic_write(folder / name, save(plain))

    # config.json comes last: a folder that has it is complete.
    document = {"format": FORMAT, **config}
    atomic_write(folder / "adapter_config.json", json.dumps(adapter, indent=1) + "\n")
    atomic_write(folder / "config.json", json.dumps(document, indent=1) + "\n")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of a Dot.

    Raises:
        DotMismatchError: If it is missing or of another format.
    """
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']}, not {FORMAT}")
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DotMismatchError(
            f"{path} holds no Dot ({error}); give a folder written by train-dot"
        ) from error


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read what ``write_dot`` was given as ``blocks`` and ``residuals``, onto the CPU.

    A damaged file makes the readers fail in their own ways; the caller names the folder.
    """
    return load_file(Path(path) / BLOCKS_FILE), load_file(Path(path) / RESIDUALS_FILE)


def check_match(saved: Mapping[str, Any], current: Mapping[str, Any], *, strict: bool) -> None:
    """Compare what a Dot was trained for with what it is about to be used with.

    Args:
        saved: By name, as stored with the Dot.
        current: The same names.
        strict: Refuse the first difference; else warn about each.

    Raises:
        DotMismatchError: With the name and both values.
    """
    for name, value in saved.items():
        if value == current[name]:
            continue
        message = (
            f"the Dot was trained for {name.replace('_', ' ')} {value}, this is {current[name]}; "
            "use the pipeline it was trained on, or strict=False to go on with a warning"
        )
        if strict:
            raise DotMismatchError(message)
        warn(message)
