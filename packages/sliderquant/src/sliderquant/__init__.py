"""SliderQuant: post-training quantization of language models with sliding windows.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). ``quantize`` takes a model directory to a quantized
one; ``evaluate``, ``inspect`` and ``demo`` are the other commands; ``calibrate`` is the method itself.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "EvalConfig": "config",
    "InspectConfig": "config",
    "QuantizeConfig": "config",
    "SliderConfig": "config",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "inspect": "plan",
    "make_windows": "windows",
    "quantize": "quantization",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'sliderquant' has no attribute {name!r}")
    value = getattr(import_module(f"sliderquant.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
