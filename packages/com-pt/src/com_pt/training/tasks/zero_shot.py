"""The classes of zero-shot classification and the templates that make prompts of their names.

ImageNet's 1,000 names and the templates of OpenAI's CLIP are those that open_clip ships.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effml_common.errors import ConfigError, InputError
from effml_common.parsing import one_line

IMAGENET = "imagenet"  # stands for the classes, and for OpenAI's 80 templates
OPENAI, SIMPLE = "openai", "simple"  # 80 and 7 templates
Template = Callable[[str], str]


def read_classes(value: str | Sequence[str]) -> list[str]:
    """Return the names of the classes: a list, the lines of a file, or those of ``imagenet``.

    Raises:
        InputError: If there are none.
    """
    if value == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return _read_lines(value, "classes")


def read_templates(value: str | Sequence[str]) -> list[Template]:
    """Return functions from a class's name to a prompt.

    Args:
        value: Texts with ``{}``, the lines of a file, or ``imagenet``, ``openai`` or ``simple``.

    Raises:
        InputError: If there are none, or one has no place for the name.
    """
    # Those that open_clip ships are functions already.
    if value in (IMAGENET, OPENAI, SIMPLE):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(SIMPLE_IMAGENET_TEMPLATES if value == SIMPLE else OPENAI_IMAGENET_TEMPLATES)

    # The user's are texts.
    texts = _read_lines(value, "templates")
    for text in texts:
        if "{}" not in text:
            raise InputError(f"the template {text!r} has no place for the name; write {{}} there")
    return [lambda name, text=text: text.replace("{}", name) for text in texts]


def make_prompts(classes: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Return every class in every template, all prompts of the first class first."""
    return [template(name) for name in classes for template in templates]


def number_classes(found: Sequence[str], value: str | Sequence[str]) -> list[int]:
    """Return the number of each class that a data set has.

    Args:
        found: The data set's own names of its classes. For ImageNet they are WordNet ids (names of
            folders such as n01440764), numbers from 0 to 999, or open_clip's names.
        value: The zero-shot setting ``classes``.

    Raises:
        InputError: If one is not among the classes, or its name does not tell which it is.
    """
    # ImageNet's classes are numbered by their WordNet ids, in ascending order.
    names = read_classes(value)
    if value == IMAGENET:
        from timm.data import ImageNetInfo

        ids = ImageNetInfo().label_names()
        if set(found) <= set(ids):
            return [ids.index(name) for name in found]
        if all(name.isdecimal() and int(name) < len(ids) for name in found):
            return [int(name) for name in found]

    # By name, which two of ImageNet's classes share with another.
    unknown = sorted(set(found) - set(names))
    if unknown:
        remedy = "name folders for WordNet ids (n01440764)" if value == IMAGENET else "add it"
        raise ConfigError(f"class {unknown[0]} is not among the zero-shot classes; {remedy}")
    shared = sorted(name for name in found if names.count(name) > 1)
    if shared:
        raise ConfigError(f"{names.count(shared[0])} classes are called {shared[0]}; use numbers")
    return [names.index(name) for name in found]


def _read_lines(value: Any, what: str) -> list[str]:
    """Return a list, or the lines of a text or JSON file that are not empty."""
    if isinstance(value, str):
        try:
            text = Path(value).read_text(encoding="utf-8")
            value = json.loads(text) if value.endswith(".json") else text.splitlines()
        except (OSError, ValueError) as error:
            raise InputError(
                f"zero-shot {what} {value} cannot be read: {one_line(error)}; give a text file "
                f"or a JSON list in UTF-8, or {IMAGENET}"
            ) from error
    lines = [str(item) for item in value if str(item).strip()]
    if not lines:
        raise InputError(f"there are no zero-shot {what}; give at least one")
    return lines
