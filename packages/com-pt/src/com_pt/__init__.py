"""Pre-train a model family as a chain: each model grows from, and is guided by, its predecessor.

Paper: "Chain-of-Models Pre-Training" (Fan, Wang, Li, Liu, Yao; CVPR 2026, arXiv 2604.12391).
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ChainConfig": "chain",
    "GrowthReport": "growth",
    "InverseFeatureLoss": "losses",
    "Layout": "layout",
    "Task": "tasks.base",
    "grow": "adapters.grow",
    "load_chain": "chain",
    "plan_chain": "run",
    "register_layout": "adapters.grow",
    "run_chain": "run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and the host libraries.
    if name not in _HOMES:
        raise AttributeError(f"module 'com_pt' has no attribute {name!r}")
    value = getattr(import_module(f"com_pt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
