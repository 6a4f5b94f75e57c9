"""Public names of a package that are imported only when somebody uses them."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> None:
    """Let a package offer names whose ``homes``, modules relative to it, are not imported yet.

    Called in its ``__init__``, so that ``command --help`` need not wait for torch. Editors read the
    same names from imports under ``if TYPE_CHECKING:``, written ``from x import A as A``.
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
