"""Morse: a small second network fills in the skipped steps of a diffusion model.

Paper: "Morse: Dual-Sampling for Lossless Acceleration of Diffusion Models" (Li, Fan, Yao; ICML 2025,
arXiv 2506.18251). The Dash is the user's own denoiser, the Dot the network that corrects its last
estimate.
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from morse_diffusion.adapters.apply import apply_morse as apply_morse
    from morse_diffusion.adapters.apply import remove_morse as remove_morse
    from morse_diffusion.adapters.dot import MorseDot as MorseDot
    from morse_diffusion.adapters.pipeline import MorsePipeline as MorsePipeline
    from morse_diffusion.method.sampler import ExtrapolationDot as ExtrapolationDot
    from morse_diffusion.method.sampler import MorseSampler as MorseSampler
    from morse_diffusion.method.sampler import ZeroDot as ZeroDot
    from morse_diffusion.method.schedule import MorsePlan as MorsePlan
    from morse_diffusion.method.schedule import make_plan as make_plan
    from morse_diffusion.training.trainer import DotTrainer as DotTrainer

lazy_exports(
    __name__,
    {
        "DotTrainer": "training.trainer",
        "ExtrapolationDot": "method.sampler",
        "MorseDot": "adapters.dot",
        "MorsePipeline": "adapters.pipeline",
        "MorsePlan": "method.schedule",
        "MorseSampler": "method.sampler",
        "ZeroDot": "method.sampler",
        "apply_morse": "adapters.apply",
        "make_plan": "method.schedule",
        "remove_morse": "adapters.apply",
    },
)
