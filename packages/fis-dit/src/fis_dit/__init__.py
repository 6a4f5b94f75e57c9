"""Frame-interleaved sparsity for few-step video diffusion transformers, on unmodified diffusers models.

Paper: "Frame Interleaved Sparsity" (arXiv 2605.11869). ``apply_fis(pipe, FISConfig())`` is all that a
pipeline needs; ``plan`` chooses the blocks, ``inspect``, ``generate`` and ``bench`` are the commands.
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from fis_dit.adapters.apply import apply_fis as apply_fis
    from fis_dit.adapters.apply import remove_fis as remove_fis
    from fis_dit.adapters.layout import FISAdapter as FISAdapter
    from fis_dit.adapters.registry import register_adapter as register_adapter
    from fis_dit.commands.bench import bench as bench
    from fis_dit.commands.generate import generate as generate
    from fis_dit.commands.inspect import inspect as inspect
    from fis_dit.commands.plan import plan as plan
    from fis_dit.config import FISConfig as FISConfig
    from fis_dit.method.cost import flops as flops

lazy_exports(
    __name__,
    {
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
    },
)
