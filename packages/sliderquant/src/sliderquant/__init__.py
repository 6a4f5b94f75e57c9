"""SliderQuant: post-training quantization of language models with sliding windows.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). ``quantize`` takes a model directory to a quantized
one and ``load`` reads what only this package reads; the other commands are ``evaluate``, ``export``,
``inspect`` and ``demo``; ``calibrate`` is the method itself.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "QuantizeConfig": "config",
    "SliderConfig": "config",
    "calibrate": "method.calibration",
    "evaluate": "commands.eval",
    "export": "commands.export",
    "inspect": "commands.inspect",
    "load": "adapters.native",
    "make_windows": "method.windows",
    "quantize": "commands.quantize",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'sliderquant' has no attribute {name!r}")
    value = getattr(import_module(f"sliderquant.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
