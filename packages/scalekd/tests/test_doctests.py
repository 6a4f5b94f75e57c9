"""The examples in the docstrings run as they are written."""

import doctest
import importlib

import pytest

MODULES = [
    "adapters.pairing",
    "adapters.student",
    "adapters.task",
    "adapters.teacher",
    "config",
    "method.feature_mimicking",
    "method.projector",
]


@pytest.mark.parametrize("name", MODULES)
def test_an_example_in_a_docstring_runs(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"scalekd.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
