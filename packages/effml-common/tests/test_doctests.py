"""The examples in the docstrings."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["report"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"effml_common.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
