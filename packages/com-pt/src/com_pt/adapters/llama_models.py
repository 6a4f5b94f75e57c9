"""Settings of transformers' Llama."""

from collections.abc import Mapping
from typing import Any

from effml_common.errors import ConfigError
from effml_common.parsing import one_line


def llama_config(spec: Any) -> Any:
    """Make a ``LlamaConfig`` from its settings or a folder.

    Raises:
        ConfigError: If transformers refuses them.
    """
    from transformers import LlamaConfig

    try:
        if isinstance(spec, Mapping):
            return LlamaConfig(**spec)
        return LlamaConfig.from_pretrained(spec)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"transformers refuses the model {spec!r}: {one_line(str(error))}; give Llama settings"
        ) from error
