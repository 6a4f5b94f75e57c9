"""The file of a chain: YAML, or a recipe of the package, with the settings of ``ChainConfig``."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from com_pt.method_config import ChainConfig, StageConfig
from effml_common.errors import ConfigError, InputError
from effml_common.parsing import did_you_mean, one_line

RECIPES = Path(__file__).parents[1] / "recipes"


def load_chain(path: str | Path) -> ChainConfig:
    """Read a chain from YAML, or a recipe of the package by its name.

    Settings of a stage that stand outside ``stages`` hold for all stages.

    Raises:
        InputError: If the file cannot be read.
        ConfigError: If a setting is unknown, missing or out of range.

    Example:
        >>> [stage.name for stage in load_chain("cc3m-vit-tsbl").stages]
        ['T', 'S', 'B', 'L']
    """
    import yaml

    # A file of the user's goes before a recipe of the same name.
    file = Path(path)
    recipe = RECIPES / f"{path}.yaml"
    if not file.exists() and recipe.exists():
        file = recipe

    # Whatever is wrong with the file, the message names the recipes that there are.
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise InputError(
            f"{path} cannot be read as YAML: {one_line(str(error))}; "
            f"give a chain file or one of {recipes}"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("stages"), list):
        raise ConfigError(f"{path} has no list of stages; see docs/settings.md for one")
    return parse_chain(document)


def parse_chain(document: Mapping[str, Any]) -> ChainConfig:
    """Make a chain from the content of its file.

    Raises:
        ConfigError: If a setting is unknown, missing, of the wrong type or out of range.
    """
    of_stage = {field.name for field in fields(StageConfig)}
    common = {k: v for k, v in document.items() if k in of_stage}
    of_chain = {k: v for k, v in document.items() if k not in of_stage and k != "stages"}
    wrong = next((stage for stage in document["stages"] if not isinstance(stage, Mapping)), None)
    if wrong is not None:
        raise ConfigError(f"a stage is {wrong!r}; give settings such as {{name: S, model: ...}}")
    stages = tuple(_make(StageConfig, {**common, **stage}) for stage in document["stages"])
    return _make(ChainConfig, {**of_chain, "stages": stages})


def _make(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Make a dataclass of settings from what stands in the file."""
    types = get_type_hints(kind)
    converted = {}
    for name, value in values.items():
        if name not in types:
            hint = did_you_mean(name, list(types), f"use one of {', '.join(types)}")
            raise ConfigError(f"there is no setting {name}; {hint}")
        converted[name] = _convert(name, value, types[name])
    try:
        return kind(**converted)
    except TypeError as error:
        raise ConfigError(f"{one_line(str(error))}; see docs/settings.md for one") from error


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to its type: YAML reads 1e-3 as text."""
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    if name == "betas":
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"betas are {value!r}; give two numbers, such as [0.9, 0.98]")
        return tuple(_convert_number("a beta", item, float) for item in value)

    # Counts and rates must be numbers, and switches true or false.
    for kind in (float, int):
        if kind in allowed and value is not None:
            return _convert_number(name, value, kind)
    if bool in allowed and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; give true or false")
    return value


def _convert_number(name: str, value: Any, kind: type[float] | type[int]) -> float:
    try:
        number = kind(value)
        if isinstance(value, bool) or number != float(value):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; give a number") from None
