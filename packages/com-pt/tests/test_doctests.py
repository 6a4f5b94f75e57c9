"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest

import com_pt

MODULES = [
    "adapters.grow",
    "adapters.layouts",
    "config",
    "method.growth",
    "method.layout",
    "method.losses",
    "method.matching",
    "training.chain",
    "training.plan",
    "training.tasks.base",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"com_pt.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_public_name_that_needs_no_files_has_an_example() -> None:
    for name in sorted(set(com_pt.__all__) - {"run_chain"}):
        assert ">>>" in (getattr(com_pt, name).__doc__ or ""), name
