"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import sliderquant

ROOT = Path(sliderquant.__file__).parent
MODULES = sorted(
    ".".join(("sliderquant", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_settings_and_the_plan_have_examples() -> None:
    assert {"sliderquant.config", "sliderquant.commands.inspect"} <= {*MODULES}
