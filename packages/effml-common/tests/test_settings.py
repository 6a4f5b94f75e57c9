"""The words of a config dataclass."""

from dataclasses import dataclass

import pytest

from effml_common.cli import parse
from effml_common.errors import ConfigError
from effml_common.settings import require, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Count."""

    count: int = setting(3, "how many")

    def __post_init__(self) -> None:
        require(self.count > 0, f"count must be 1 or more, got {self.count}", "use 3")


def test_a_setting_has_its_default_and_shows_its_help(capsys) -> None:
    assert parse(Config, [], prog="x") == Config(count=3)
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], prog="x")
    assert "how many" in capsys.readouterr().out


def test_a_refused_setting_says_what_is_wrong_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"^count must be 1 or more, got 0; use 3$"):
        parse(Config, ["--count", "0"], prog="x")
