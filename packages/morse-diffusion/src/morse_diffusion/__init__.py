"""Morse: a small second network fills in the skipped steps of a diffusion model.

Paper: "Morse: Dual-Sampling for Lossless Acceleration of Diffusion Models" (Li, Fan, Yao; ICML 2025,
arXiv 2506.18251). The Dash is the user's own denoiser, the Dot the network that corrects its last
estimate.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "DotTrainer": "trainer",
    "ExtrapolationDot": "sampler",
    "MorseDot": "adapters.dot",
    "MorsePipeline": "adapters.pipeline",
    "MorsePlan": "plan",
    "MorseSampler": "sampler",
    "ZeroDot": "sampler",
    "apply_morse": "adapters.hook",
    "make_plan": "plan",
    "remove_morse": "adapters.hook",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Resolved at first use: --help must not wait for torch and diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module 'morse_diffusion' has no attribute {name!r}")
    value = getattr(import_module(f"morse_diffusion.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
