"""Public names of a package that are imported only when somebody uses them."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> None:
    """Let a package offer names without importing the modules that define them.

    ``command --help`` then answers without waiting for torch. Editors and type checkers read the
    same names from imports under ``if TYPE_CHECKING:``, written ``from x import A as A``.

    Called once in the package's ``__init__`` with its ``__name__`` and, for each public name, the
    module that defines it, relative to the package.
    """
    module = sys.modules[package]

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(module, name, value)
        return value

    # Python asks a module's own __getattr__ for what the module does not hold (PEP 562).
    vars(module).update(__getattr__=resolve, __dir__=lambda: sorted(homes), __all__=list(homes))
