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
from morse_diffusion.adapters.calls import device_of_weights
from morse_diffusion.adapters.dot import DotShape, MorseDot
from morse_diffusion.adapters.schedulers import family_of, prediction_of
from morse_diffusion.errors import DotMismatchError
from morse_diffusion.lora import path_without_adapters

FORMAT = 1
BLOCKS, RESIDUALS = "dot_blocks.safetensors", "adapter_model.safetensors"
_RESIDUAL_PREFIX = "residuals."


def fingerprint(dash: nn.Module) -> str:
    """Identity of a Dash: its class, the names and shapes of its weights, and a sample of their signs.

    Signs, because a Dash loaded in half precision is the same Dash. A LoRA in PEFT's form beside the
    weights does not count; one that was fused into them does.
    """
    sha = hashlib.sha256(type(dash).__name__.encode())
    named = ((path_without_adapters(name), weight) for name, weight in dash.named_parameters())
    for name, weight in sorted((n, w) for n, w in named if n is not None):
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // 64)][:64]
        # bfloat16 has the range of float32, so no sign is lost; float16 flushes below 6e-8.
        signs = (some.float() > 1e-6).cpu().tolist()
        sha.update(f"{name} {tuple(weight.shape)} {signs}".encode())
    return sha.hexdigest()[:16]


def save_dot(dot: MorseDot, path: str | Path, training: Mapping[str, Any]) -> None:
    """Write a Dot; no weight of the Dash goes with it.

    Args:
        dot: The Dot.
        path: Folder, made if missing.
        training: What it was trained on: ``family``, ``prediction``, ``steps_of_process`` and others.
    """
    folder, shape = Path(path), dot.shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "dash_class": type(dot.dash).__name__,
        "dash_fingerprint": fingerprint(dot.dash),
        "m": shape.m,
        "channels": list(shape.channels),
        "layers": shape.layers,
        "lora_rank": shape.lora_rank,
        "lora_conv_form": "k x k down, 1 x 1 up",
        "guidance": list(shape.guidance) if shape.guidance else None,
        "training": {**dot.trained, **training},
    }
    blocks = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in dot.state_dict().items()
        if not name.startswith(_RESIDUAL_PREFIX)
    }
    residuals = {k: v.cpu().contiguous() for k, v in dot.residuals.peft_state().items()}
    adapter = {
        "peft_type": "LORA",
        "r": shape.lora_rank,
        "lora_alpha": dot.residuals.alpha,
        "target_modules": sorted(dot.residuals.paths),
        "bias": "none",
        "inference_mode": True,
    }
    atomic_write(folder / BLOCKS, save(blocks))
    atomic_write(folder / RESIDUALS, save(residuals))
    atomic_write(folder / "adapter_config.json", json.dumps(adapter, indent=1) + "\n")
    atomic_write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a Dot.

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


def load_dot(path: str | Path, dash: nn.Module, *, strict: bool = True) -> MorseDot:
    """Load a Dot around its Dash, in eval mode, on the Dash's device.

    Args:
        path: Folder.
        dash: The Dash it was trained for.
        strict: Refuse another Dash; else only warn.

    Raises:
        DotMismatchError: If the Dash or the files differ from what was saved.
        UnsupportedDenoiserError: If the Dash is offloaded layer by layer.
    """
    config, folder = read_config(path), Path(path)
    device_of_weights(dash)
    shape = DotShape(
        m=config["m"],
        channels=tuple(config["channels"]),
        layers=config["layers"],
        lora_rank=config["lora_rank"],
        guidance=tuple(config["guidance"]) if config["guidance"] else None,
    )
    _compare(
        {"dash_class": config["dash_class"], "dash_fingerprint": config["dash_fingerprint"]},
        {"dash_class": type(dash).__name__, "dash_fingerprint": fingerprint(dash)},
        strict,
    )
    dot = MorseDot.build(dash, shape)
    try:
        blocks: dict[str, Tensor] = load_file(folder / BLOCKS)
        missing, unexpected = dot.load_state_dict(blocks, strict=False)
        lost = [name for name in missing if not name.startswith(_RESIDUAL_PREFIX)]
        if lost or unexpected:
            raise ValueError(f"{len(lost)} tensors are missing, {len(unexpected)} too many")
        dot.residuals.load_peft_state(load_file(folder / RESIDUALS))
    except Exception as error:  # a damaged file makes the readers fail in their own ways
        raise DotMismatchError(
            f"the weights in {folder} do not fit this Dash ({error}); train a Dot for it"
        ) from error
    dot.trained, dot.dash_fingerprint = config["training"], config["dash_fingerprint"]
    return dot.eval()


def check_fits(dot: MorseDot, denoiser: nn.Module, scheduler: Any, *, strict: bool) -> None:
    """Compare a Dot with the network and the scheduler that it is about to run beside.

    Raises:
        DotMismatchError: Naming what differs; with ``strict=False`` a warning.
    """
    found = fingerprint(denoiser)
    if dot.dash is not denoiser:
        _compare({"Dash": fingerprint(dot.dash)}, {"Dash": found}, strict)
    if dot.dash_fingerprint not in (None, found) or getattr(denoiser, "peft_config", None):
        warn(
            "the Dash has a LoRA or other weights that the Dot was not trained with: its residuals "
            "fit less well, so give it fewer steps"
        )
    ours = {
        "family": family_of(scheduler),
        "prediction": prediction_of(scheduler),
        "steps_of_process": int(scheduler.config.get("num_train_timesteps") or 1000),
    }
    saved = {name: dot.trained[name] for name in ours if name in dot.trained}
    _compare(saved, {name: ours[name] for name in saved}, strict)


def _compare(saved: Mapping[str, Any], found: Mapping[str, Any], strict: bool) -> None:
    for name, value in saved.items():
        if value != found[name]:
            message = (
                f"the Dot was trained for {name.replace('_', ' ')} {value}, this is {found[name]}; "
                "use the pipeline it was trained on, or strict=False to go on with a warning"
            )
            if strict:
                raise DotMismatchError(message)
            warn(message)
