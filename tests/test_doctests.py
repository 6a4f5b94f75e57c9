"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import inspect

import pytest

from workspace import COMMON, Member, members

METHODS = [member for member in members() if member.name != COMMON]
MODULES = [
    ".".join((member.module, *path.relative_to(member.source).with_suffix("").parts))
    for member in members()
    for path in sorted(member.source.rglob("*.py"))
    if ">>> " in path.read_text()
]
# Whole commands read and write files, or take seconds: the examples/ of their package show them. The
# docstring of a command's settings is the text of its --help, which has examples of its own.
SHOWN_ELSEWHERE = {
    "com-pt": {"run_chain"},
    "fis-dit": {"bench", "generate", "inspect", "plan"},
    "scalekd": {"TrainConfig", "train"},
    "sliderquant": {"QuantizeConfig", "evaluate", "export", "load", "quantize"},
}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("member", METHODS, ids=lambda member: member.name)
def test_a_public_name_has_an_example(member: Member) -> None:
    package = importlib.import_module(member.module)
    without = [
        name
        for name in package.__all__
        if callable(value := getattr(package, name)) and ">>>" not in (inspect.getdoc(value) or "")
    ]
    assert set(without) == SHOWN_ELSEWHERE.get(member.name, set())
