"""Config classes, and their objects from words and YAML files, and back.

The frozen dataclass is the only home of names, types, defaults and help. Users write dashes
(``--group-size 64``), fields have underscores. jsonargparse is imported inside functions, because
it takes half a second.
"""

import argparse
import difflib
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from effml_common.errors import ConfigError

T = TypeVar("T")

COMMON_FLAGS = {
    "--json": "print the result alone, as JSON, on standard output",
    "--quiet": "no progress, only warnings",
    "--debug": "show the traceback of an error",
}


def setting(default: Any, text: str, group: str = "") -> Any:
    """A dataclass field with a default, the help that the command line shows, and its heading there."""
    return field(default=default, metadata={"help": text, "group": group})


def require(condition: bool, problem: str, remedy: str) -> None:
    """Raise ConfigError if a setting does not fulfil a condition: what is wrong, and what to do."""
    if not condition:
        raise ConfigError(f"{problem}; {remedy}")


def parse(
    config_class: type[T], argv: Sequence[str], *, prog: str, examples: Sequence[str] = ()
) -> T:
    """Read the words after the name of a command, ``prog``, into its config, which validates itself.

    Required fields are positional arguments in their order, all others are flags. List fields are
    always flags, and take every bare word that follows. ``--config FILE`` reads YAML, and flags
    win over it. Optional fields take ``none``. The help ends with ``examples``.

    Raises:
        ConfigError: If a flag, a key, a type or a value is wrong.
        SystemExit: With code 0, after ``--help``.
    """
    see_help = f"see {prog} --help"
    hints = get_type_hints(config_class)
    parser = _parser(prog, inspect.getdoc(config_class) or "", examples, hints)
    flags, positionals = {}, []
    groups: dict[str, Any] = {"": parser}
    for entry in fields(config_class):  # pyright: ignore[reportArgumentType]
        title = entry.metadata.get("group", "")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if _add(groups[title], entry, hints[entry.name]):
            positionals.append(_flag(entry.name))
        else:
            flags[_flag(entry.name)] = hints[entry.name]

    # What the parser says is passed on as it is, on one line.
    words = _regroup(argv, flags, positionals, see_help)
    try:
        values = parser.parse_args(words)
    except Exception as error:  # odd words make the parsers fail in odd ways, AttributeError too
        raise ConfigError(f"{one_line(error).rstrip('.')}; {see_help}") from error

    # The config refuses values of the right type that make no sense.
    try:
        return config_class(**{name: _value(values[name], hint) for name, hint in hints.items()})
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{one_line(error)}; {see_help}") from error


def dump_config(config: Any) -> str:
    """The YAML of a config, which ``--config`` reads back to an equal object."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what other readers take for a number, such as 1e-3, or for a line break."""

    def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        style = '"' if re.match(r"[-+.\d]", text) or not text.isprintable() else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, quoted)
    # YAML has no tuples and no paths: by way of JSON they become lists and strings.
    plain = json.loads(json.dumps(asdict(config), default=os.fspath))
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def one_line(message: object) -> str:
    """Collapse white space and line breaks; escape what no stream could print."""
    return " ".join(str(message).encode(errors="backslashreplace").decode().split())


def did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    """Advice that names the nearest known word, or else ``otherwise``."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def _parser(prog: str, description: str, examples: Sequence[str], hints: Mapping[str, Any]) -> Any:
    import jsonargparse

    class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults beside the help, and the line breaks of the examples."""

        def _get_help_string(self, action: argparse.Action) -> str:
            words = _words(hints[action.dest]) if action.dest in hints else "%(type)s"
            return super()._get_help_string(action).replace("%(type)s", words)

    lines = ["common flags:", *(f"  {flag:<9}{text}" for flag, text in COMMON_FLAGS.items())]
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n".join(lines),
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        formatter_class=Help,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags win")
    return parser


def _add(parser: Any, entry: Field[Any], hint: Any) -> bool:
    """Add one field to the parser; returns whether it is given by its place, without a flag."""
    from jsonargparse import ActionYesNo

    factory = entry.default_factory
    default = entry.default if factory is MISSING else factory()
    positional = default is MISSING and not _is_list(hint) and hint is not bool
    options: dict[str, Any] = {"type": hint, "help": entry.metadata.get("help", "")}
    if default is not MISSING:
        options["default"] = default
    elif not positional:
        options["required"] = True
    if _is_list(hint):
        # The same spelling for both kinds: for list[...] jsonargparse would add a flag "--name+".
        options["type"] = tuple[get_args(hint)[0], ...]
        options["metavar"] = f"{entry.name.upper()}..."
    elif hint is bool:
        del options["type"]
        options["action"] = ActionYesNo(no_prefix="no-")
    elif NoneType in get_args(hint) and str not in get_args(hint):
        options["type"] = hint | Literal["none"]
    if not positional:
        options["dest"] = entry.name
    parser.add_argument(entry.name if positional else _flag(entry.name), **options)
    return positional


def _regroup(
    argv: Sequence[str], flags: Mapping[str, Any], positionals: Sequence[str], see_help: str
) -> list[str]:
    """Dashes in names, config files first, the words after a list flag as one JSON list."""
    item_types = {flag: get_args(hint)[0] for flag, hint in flags.items() if _is_list(hint)}
    switches = [f"--no-{flag[2:]}" for flag, hint in flags.items() if hint is bool]
    known = [*flags, *switches, "--config", "--help", "--"]
    lists: dict[str, list[str]] = {}
    first: list[str] = []
    others: list[str] = []

    # Word by word; a flag may take the words that follow it.
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--"):
            others.append(word)
        elif name in positionals:
            raise ConfigError(f"{name} is no flag; write its value at its place ({see_help})")
        elif name not in known:
            raise ConfigError(f"there is no flag {name}; {did_you_mean(name, known, see_help)}")
        elif name in item_types:
            items = lists.setdefault(name, [])
            items.extend([value] if equals else [])
            while not equals and words and not re.match(r"-[^\d.]", words[0]):
                items.append(words.pop(0))
        else:
            # argparse would take a value such as -1e-3, or a missing file name, for a flag.
            if not equals and words and (name == "--config" or re.match(r"-[\d.]", words[0])):
                equals, value = "=", words.pop(0)
            (first if name == "--config" else others).append(name + equals + value)

    # The parser reads a list from one word.
    for name, items in lists.items():
        is_json = len(items) == 1 and items[0].startswith("[")
        quote = json.dumps if item_types[name] is str else str
        joined = items[0] if is_json else f"[{', '.join(map(quote, items))}]"
        first.append(f"{name}={joined}")
    return first + others


def _words(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Literal or NoneType in parts:
        return " or ".join(map(_words, parts))
    if _is_list(hint):
        return f"list of {_words(parts[0])}"
    name = "none" if hint is NoneType else getattr(hint, "__name__", str(hint))
    return str(hint) if parts else name


def _flag(name: str) -> str:
    """The flag of a field; one that ends in "_" is called like a word of Python, such as for_."""
    return "--" + name.rstrip("_").replace("_", "-")


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple)


def _value(value: Any, hint: Any) -> Any:
    if get_origin(hint) is list:
        return list(value)
    return None if NoneType in get_args(hint) and value == "none" else value
