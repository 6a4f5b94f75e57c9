"""The classes of zero-shot classification and the templates that make prompts of their names.

ImageNet's 1,000 names and the templates of OpenAI's CLIP are those that open_clip ships.
"""

from collections.abc import Callable, Sequence

from com_pt.training.data.decoding import read_names
from effml_common.errors import ConfigError, InputError

IMAGENET = "imagenet"  # stands for ImageNet's classes, and for the 80 templates
OPENAI, SIMPLE = "openai", "simple"  # 80 and 7 templates
Template = Callable[[str], str]


def read_classes(value: str | Sequence[str]) -> list[str]:
    """Return the names of the classes, for prompts: a list, the lines of a file, or ``imagenet``.

    Raises:
        InputError: If there are none.
    """
    if value == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return _some(read_names(value), "classes")


def read_labels(value: str | Sequence[str]) -> list[str]:
    """Return what pictures are labelled with, in the order of the classes.

    For ImageNet these are WordNet ids (n01440764), whose ascending order is that of its classes: two
    pairs of classes share a name.
    """
    if value == IMAGENET:
        from timm.data import ImageNetInfo

        return ImageNetInfo().label_names()
    return read_classes(value)


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
    texts = _some(read_names(value), "templates")
    for text in texts:
        if "{}" not in text:
            raise ConfigError(f"the template {text!r} has no place for a class; add {{}}")
    return [lambda name, text=text: text.replace("{}", name) for text in texts]


def make_prompts(classes: Sequence[str], templates: Sequence[Template]) -> list[str]:
    """Return every class in every template, all prompts of the first class first."""
    return [template(name) for name in classes for template in templates]


def _some(names: list[str], what: str) -> list[str]:
    if not names:
        raise InputError(f"there are no zero-shot {what}; give at least one")
    return names
