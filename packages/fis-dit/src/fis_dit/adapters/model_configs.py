"""Read what a diffusers directory says of its transformer, from JSON files alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effml_common.errors import InputError
from fis_dit.adapters.layout import FISAdapter
from fis_dit.adapters.registry import find_adapter

# Two spellings of (video frames, pixels) per latent one, in the config of a VAE.
COMPRESSION_KEYS = (
    ("scale_factor_temporal", "scale_factor_spatial"),
    ("temporal_compression_ratio", "spatial_compression_ratio"),
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer as its config describes it, without one weight.

    Attributes:
        model_class: Name of the transformer's class.
        values: All arguments of the class, defaults included.
        compression: (video frames, pixels) per latent one, or None if no VAE says so.
        adapter: Layout of the class.
    """

    model_class: str
    values: Mapping[str, Any]
    compression: tuple[int, int] | None
    adapter: FISAdapter

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.values["num_layers"]

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer, which is built on the meta device."""
        import diffusers
        import torch

        with torch.device("meta"):
            transformer = getattr(diffusers, self.model_class)(**self.values)
        return sum(parameter.numel() for parameter in transformer.parameters())


def read_model_config(model: str) -> ModelConfig:
    """Read the config of a model's transformer, and of its VAE if there is one.

    Args:
        model: Pipeline directory, transformer directory, or a transformer's config.json.

    Raises:
        InputError: If there is no readable config, or its class has no adapter.
    """
    path = Path(model)
    candidates = [path / "transformer" / "config.json", path / "config.json", path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise InputError(f"{model} has no config.json; give a diffusers directory or the file")
    config = _read_json(file)
    name = str(config.get("_class_name", ""))
    adapter = find_adapter(name)
    return ModelConfig(
        model_class=name,
        values=with_defaults(name, config),
        compression=_read_compression(path / "vae" / "config.json"),
        adapter=adapter,
    )


def with_defaults(model_class: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a diffusers class: its defaults, where ``config`` says nothing else."""
    import inspect

    import diffusers

    signature = inspect.signature(getattr(diffusers, model_class).__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if p.default is not p.empty}
    return {**defaults, **{k: v for k, v in config.items() if k in defaults}}


def _read_compression(file: Path) -> tuple[int, int] | None:
    if not file.is_file():
        return None
    config = _read_json(file)
    for time, space in COMPRESSION_KEYS:
        if isinstance(config.get(time), int) and isinstance(config.get(space), int):
            return config[time], config[space]
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON ({error}); check the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no config; give a transformer's config.json")
    return value
