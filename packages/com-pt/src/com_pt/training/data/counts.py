"""Settings of the data that are counts."""

from collections.abc import Mapping
from typing import Any

from effml_common.errors import ConfigError


def read_count(data: Mapping[str, Any], name: str, default: int) -> int:
    """Return a count among the settings of the data.

    Raises:
        ConfigError: If it is no whole number of 1 or more.
    """
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"data: {name} is {value!r}; give a whole number of 1 or more")
    return value
