"""The two words that a config dataclass is written with: a field with its help, and a check."""

from dataclasses import field
from typing import Any

from effml_common.errors import ConfigError


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default and the help that the command line shows."""
    return field(default=default, metadata={"help": text})


def require(condition: bool, problem: str, remedy: str) -> None:
    """Refuse a setting: what is wrong, with the value, and what to do about it.

    Raises:
        ConfigError: "problem; remedy", if ``condition`` does not hold.
    """
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")
