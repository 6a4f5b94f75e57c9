"""Pre-train a model family as a chain: each model grows from, and is guided by, its predecessor.

Paper: "Chain-of-Models Pre-Training" (Fan, Wang, Li, Liu, Yao; CVPR 2026, arXiv 2604.12391).
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from com_pt.adapters.grow import grow as grow
    from com_pt.adapters.layouts import register_layout as register_layout
    from com_pt.method.growth import GrowthReport as GrowthReport
    from com_pt.method.layout import Layout as Layout
    from com_pt.method.losses import InverseFeatureLoss as InverseFeatureLoss
    from com_pt.method_config import ChainConfig as ChainConfig
    from com_pt.training.chain import load_chain as load_chain
    from com_pt.training.plan import plan_chain as plan_chain
    from com_pt.training.run import run_chain as run_chain
    from com_pt.training.tasks.base import Task as Task

lazy_exports(
    __name__,
    {
        "ChainConfig": "method_config",
        "GrowthReport": "method.growth",
        "InverseFeatureLoss": "method.losses",
        "Layout": "method.layout",
        "Task": "training.tasks.base",
        "grow": "adapters.grow",
        "load_chain": "training.chain",
        "plan_chain": "training.plan",
        "register_layout": "adapters.layouts",
        "run_chain": "training.run",
    },
)
