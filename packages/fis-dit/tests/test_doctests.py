"""The examples in the docstrings of the package run and print what they say."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import fis_dit


def modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(fis_dit.__path__, "fis_dit.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def test_examples_print_what_they_say() -> None:
    results = [doctest.testmod(module, verbose=False) for module in modules()]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 10


def test_every_public_class_and_function_that_needs_no_files_has_an_example() -> None:
    needs_files = {"bench", "generate", "inspect", "plan"}
    for name in sorted(set(dir(fis_dit)) - needs_files):
        assert ">>>" in (getattr(fis_dit, name).__doc__ or ""), name
