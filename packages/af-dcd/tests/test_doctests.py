"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest

import af_dcd

MODULES = [
    "config",
    "demo.arms",
    "method.contrast",
    "method.distillation",
    "method.distiller",
    "method.logits_kd",
    "method.metrics",
    "method.mimicking",
    "method.presets",
    "method.taps",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"af_dcd.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_public_class_and_function_has_an_example() -> None:
    for name in sorted(set(af_dcd.__all__) - {"PRESETS"}):
        assert ">>>" in (getattr(af_dcd, name).__doc__ or ""), name
