"""Every public name has an example, and what the docstrings show is what happens."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import morse_diffusion

MODULES = [
    info.name
    for info in pkgutil.walk_packages(morse_diffusion.__path__, "morse_diffusion.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", morse_diffusion.__all__)
def test_a_public_name_has_an_example(name) -> None:
    assert ">>>" in (inspect.getdoc(getattr(morse_diffusion, name)) or "")


def test_the_examples_of_the_docstrings_hold() -> None:
    attempted = 0
    for name in MODULES:
        module = importlib.import_module(name)
        results = doctest.testmod(module)
        assert results.failed == 0, name
        attempted += results.attempted
    assert attempted > 20
