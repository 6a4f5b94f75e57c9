"""Frame-interleaved sparsity for few-step video diffusion transformers, on unmodified diffusers models.

Paper: "Frame Interleaved Sparsity" (arXiv 2605.11869). ``apply_fis(pipe, FISConfig())`` is all that a
pipeline needs; ``plan`` chooses the blocks, ``inspect``, ``generate`` and ``bench`` are the commands.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "FISAdapter": "adapters.layout",
    "FISConfig": "config",
    "apply_fis": "adapters.apply",
    "bench": "commands.bench",
    "flops": "method.cost",
    "generate": "commands.generate",
    "inspect": "commands.inspect",
    "plan": "commands.plan",
    "register_adapter": "adapters.registry",
    "remove_fis": "adapters.apply",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module 'fis_dit' has no attribute {name!r}")
    value = getattr(import_module(f"fis_dit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
